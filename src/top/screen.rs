//! The terminal, its keys, and the thread that follows the figures of the API.

use super::state::State;
use super::view::draw;
use anyhow::Context;
use ratatui::crossterm::event::{self, Event};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};
use tidegate_api::client::{Client, ClientError};
use tidegate_api::types::Figures;
use tidegate_process::EXIT_FAILURE;

/// How often keys and signals are polled, the bound of their latency.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// How long figures may be late. Those of a quarter of a million ports take a second.
const MAX_SILENCE: Duration = Duration::from_secs(5);

/// Fetches the counters of the instance.
///
/// # Errors
/// [`ClientError`].
pub(crate) async fn fetch(client: &Client) -> Result<Figures, ClientError> {
    client.get("/v1/figures").await
}

/// Shows `state` until the user quits, with new figures from `client` at each interval.
///
/// # Errors
/// Errors of the terminal. The terminal is restored in any case.
pub(crate) fn show(mut state: State, client: Client) -> anyhow::Result<()> {
    let ends = Arc::new(AtomicBool::new(false));
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&ends)).context("signal handlers")?;
    }
    let answers = follow_figures(client, state.interval)?;
    exit_with_the_terminal()?;
    // ratatui also restores the terminal on a panic.
    let mut terminal = ratatui::try_init().context("terminal")?;
    let _guard = TerminalGuard;
    let mut is_drawn = false;
    while !ends.load(Ordering::Relaxed) {
        while let Ok(answer) = answers.try_recv() {
            state.take(answer);
            is_drawn = false;
        }
        if !is_drawn {
            terminal.draw(|frame| draw(frame, &state)).context("terminal")?;
            is_drawn = true;
        }
        match event::poll(POLL_INTERVAL) {
            Ok(false) => continue,
            Ok(true) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("terminal"),
        }
        match event::read().context("terminal")? {
            Event::Key(key) if !state.press(key) => break,
            _ => is_drawn = false,
        }
    }
    Ok(())
}

/// Exits the process when its terminal is gone, after a closed window or a lost connection. The
/// kernel sends SIGHUP to the shell, which need not pass it on. crossterm 0.29 reads from a
/// terminal at its end in an endless loop (`try_read`).
fn exit_with_the_terminal() -> anyhow::Result<()> {
    let watch = || {
        let stdout = io::stdout();
        loop {
            let mut terminal = [PollFd::new(&stdout, PollFlags::empty())];
            match poll(&mut terminal, None) {
                Ok(0) | Err(Errno::INTR) => {}
                // There is no terminal left to restore.
                _ => std::process::exit(EXIT_FAILURE.into()),
            }
        }
    };
    std::thread::Builder::new()
        .name("tidegate-tty".into())
        .spawn(watch)
        .context("start a thread")?;
    Ok(())
}

/// Restores the terminal when dropped.
struct TerminalGuard;

impl Drop for TerminalGuard {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Why the figures are not followed any longer.
enum Ended {
    Client(ClientError),
    /// The view has ended.
    View,
    /// No figures for [`MAX_SILENCE`].
    Silent,
}

impl From<ClientError> for Ended {
    fn from(error: ClientError) -> Self {
        Self::Client(error)
    }
}

/// Has `client` send figures every `interval`, on a thread that ends with the process. Asks again
/// after a lost connection.
fn follow_figures(
    client: Client,
    interval: Duration,
) -> anyhow::Result<Receiver<Result<Figures, String>>> {
    // The view shows only the latest figures.
    let (sender, receiver) = sync_channel(1);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("event loop")?;
    std::thread::Builder::new()
        .name("tidegate-top".into())
        .spawn(move || {
            let target = format!("/v1/figures?interval_ms={}", interval.as_millis());
            runtime.block_on(async {
                loop {
                    tokio::time::sleep(interval).await;
                    let latest = Cell::new(Instant::now());
                    let followed = client.lines(&target, |figures: Figures| {
                        latest.set(Instant::now());
                        sender.send(Ok(figures)).map_err(|_| Ended::View)
                    });
                    let silent = async {
                        while latest.get().elapsed() < interval + MAX_SILENCE {
                            tokio::time::sleep(interval).await;
                        }
                    };
                    let followed = tokio::select! {
                        followed = followed => followed,
                        () = silent => Err(Ended::Silent),
                    };
                    let lost = match followed {
                        Err(Ended::View) => return,
                        Err(Ended::Client(error)) => error.to_string(),
                        Err(Ended::Silent) => "the instance does not answer".to_owned(),
                        Ok(()) => "the instance has ended".to_owned(),
                    };
                    if sender.send(Err(lost)).is_err() {
                        return;
                    }
                }
            });
        })
        .context("start a thread")?;
    Ok(receiver)
}
