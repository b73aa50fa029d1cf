//! The terminal, the keys, and the thread that asks.

use super::state::State;
use super::view::draw;
use crate::EXIT_FAILURE;
use crate::api::client::Client;
use crate::api::types::Figures;
use anyhow::Context;
use ratatui::crossterm::event::{self, Event};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

/// How long a key may take to be noticed, and a signal.
const LOOK: Duration = Duration::from_millis(50);

/// What an instance has counted.
///
/// # Errors
/// One line: nobody is there, or it does not know figures.
pub(crate) async fn ask(client: &Client) -> anyhow::Result<Figures> {
    client.get("/v1/figures").await
}

/// Shows `state` until the user has seen enough, with what `client` says at each interval.
///
/// # Errors
/// The terminal's. It is as it was before, however this ends.
pub(crate) fn show(mut state: State, client: Client) -> anyhow::Result<()> {
    let ends = Arc::new(AtomicBool::new(false));
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&ends)).context("signal handlers")?;
    }
    let answers = ask_repeatedly(client, state.interval)?;
    end_with_the_terminal()?;
    // It restores the terminal when something panics, too.
    let mut terminal = ratatui::try_init().context("terminal")?;
    let _restored = Restored;
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
        match event::poll(LOOK) {
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

/// Ends the process when its terminal has gone: a window that was closed, a connection that was
/// lost. SIGHUP says so to the shell, which need not pass it on; and crossterm reads the end of a
/// terminal for ever (0.29, `try_read`).
fn end_with_the_terminal() -> anyhow::Result<()> {
    let watch = || {
        let stdout = io::stdout();
        loop {
            let mut terminal = [PollFd::new(&stdout, PollFlags::empty())];
            match poll(&mut terminal, None) {
                Ok(0) | Err(Errno::INTR) => {}
                // There is nothing left to restore, and nobody to tell.
                _ => std::process::exit(EXIT_FAILURE.into()),
            }
        }
    };
    std::thread::Builder::new().name("tidegate-tty".into()).spawn(watch).context("a thread")?;
    Ok(())
}

/// Gives the terminal back.
struct Restored;

impl Drop for Restored {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// What `client` says every `interval`, from a thread that ends with the process.
fn ask_repeatedly(
    client: Client,
    interval: Duration,
) -> anyhow::Result<Receiver<Result<Figures, String>>> {
    // Not more than one is looked at.
    let (tell, told) = sync_channel(1);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("event loop")?;
    std::thread::Builder::new()
        .name("tidegate-top".into())
        .spawn(move || {
            runtime.block_on(async {
                loop {
                    tokio::time::sleep(interval).await;
                    let answer = ask(&client).await.map_err(|error| format!("{error:#}"));
                    if tell.send(answer).is_err() {
                        return;
                    }
                }
            });
        })
        .context("a thread")?;
    Ok(told)
}
