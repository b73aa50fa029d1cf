//! Output of the services: to one writer, so that lines are never interleaved, or to the log of a
//! supervisor process.
//!
//! The writer is a thread, because a terminal can block for hours (Ctrl-S), and DNS, metrics and
//! signals must keep working. A queue of [`QUEUE`] lines precedes it. While the queue is full, the
//! pipes of the services are not read, so services block in write(2). No line is dropped, and
//! memory use is bounded.
//!
//! The log ([`Log`]) never blocks a service. It needs neither thread nor queue.

use super::lines::Splitter;
use super::log::{Dropped, Limits, Log, LogLine, OutputStream};
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

/// Capacity of the queue in lines. A line has 16 KiB, or three times as much if all of it is
/// invalid UTF-8, so the queue uses at most 3 MiB.
const QUEUE: usize = 64;

/// Maximum number of bytes read from a service at a time.
const CHUNK: usize = 8 * 1024;

/// Maximum wait of notices about a service for a terminal that blocks.
const NOTICE_TIMEOUT: Duration = Duration::from_secs(1);

/// SGR numbers of the colours of names, used in turn. Legible on black and on white.
const COLOURS: [u8; 6] = [36, 33, 32, 35, 34, 96];

/// Receives the lines of all services, on its own thread. May block. The services are then blocked
/// too.
pub trait Output: Send + 'static {
    /// Writes `line`, which does not include the newline. Not called again after an error.
    ///
    /// # Errors
    /// The reader has closed the output.
    fn write_line(&mut self, line: &str) -> io::Result<()>;

    /// Returns whether names are coloured.
    fn colours(&self) -> bool {
        false
    }
}

/// Standard output. Coloured if it is a terminal and `NO_COLOR` is not set
/// (<https://no-color.org>).
#[derive(Clone, Copy, Debug, Default)]
pub struct StandardOutput;

impl Output for StandardOutput {
    fn write_line(&mut self, line: &str) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "{line}")?;
        stdout.flush()
    }

    fn colours(&self) -> bool {
        io::stdout().is_terminal()
            && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
    }
}

#[derive(Debug)]
pub(super) enum Message {
    Line(String),
    Flush(oneshot::Sender<()>),
}

/// The log of a supervisor process, shared by the services and the connections.
#[derive(Clone, Debug)]
pub(super) struct SharedLog {
    log: Arc<Mutex<Log>>,
    /// Notified after lines were added.
    changes: watch::Sender<()>,
}

impl SharedLog {
    pub(super) fn new(limits: Limits) -> Self {
        Self { log: Arc::new(Mutex::new(Log::new(limits))), changes: watch::Sender::new(()) }
    }

    /// Locks the log. Not across a wait.
    pub(super) fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a receiver that is notified when lines have been added.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// Adds `lines` of `service`.
    pub(super) fn append(
        &self,
        service: &str,
        stream: OutputStream,
        lines: impl Iterator<Item = String>,
    ) {
        let time = SystemTime::now();
        let mut log = self.lock();
        for text in lines {
            log.append(LogLine { service: service.to_owned(), stream, time, text });
        }
        drop(log);
        self.changes.send_replace(());
    }

    /// Waits until a line with the number `from` or a higher one has been dropped.
    pub(super) async fn dropped(&self, service: Option<&str>, from: u64) -> Dropped {
        let mut changes = self.changes();
        while !self.lock().has_dropped(service, from) {
            // Cannot fail, as `self` holds a sender.
            let _ = changes.changed().await;
        }
        Dropped
    }
}

/// Receives the output of all services.
#[derive(Clone, Debug)]
pub(super) enum Printer {
    /// The queue of the writer thread.
    Writer { queue: mpsc::Sender<Message>, colours: bool },
    /// The log of a supervisor process.
    Log(SharedLog),
}

impl Printer {
    /// Starts the writer thread. It ends when all clones and [`ServiceOutput`]s are dropped.
    pub(super) fn new(mut output: impl Output) -> Self {
        let colours = output.colours();
        let (queue, mut messages) = mpsc::channel(QUEUE);
        std::thread::spawn(move || {
            let mut broken = false;
            while let Some(message) = messages.blocking_recv() {
                match message {
                    // Services continue without a reader of their output.
                    Message::Line(line) => broken = broken || output.write_line(&line).is_err(),
                    Message::Flush(done) => drop(done.send(())),
                }
            }
        });
        Self::Writer { queue, colours }
    }

    /// Returns the output of service `name`. `index` selects its colour. Names are padded to
    /// `width` characters.
    pub(super) fn service_output(&self, name: &str, index: usize, width: usize) -> ServiceOutput {
        let (queue, colours) = match self {
            Self::Writer { queue, colours } => (queue.clone(), *colours),
            Self::Log(log) => {
                return ServiceOutput::Log { log: log.clone(), service: name.to_owned() };
            }
        };
        let colour = colours.then(|| COLOURS[index % COLOURS.len()]);
        let paint = |text: String| match colour {
            Some(colour) => format!("\x1b[{colour}m{text}\x1b[0m"),
            None => text,
        };
        let prefix = paint(format!("{name:width$} |"));
        ServiceOutput::Writer { queue, prefix, name: paint(name.to_owned()) }
    }

    /// Waits until all lines sent so far are written, at most [`NOTICE_TIMEOUT`].
    pub(super) async fn flush(&self) {
        let Self::Writer { queue, .. } = self else { return };
        let (done, written) = oneshot::channel();
        let flush = async {
            let _ = queue.send(Message::Flush(done)).await;
            let _ = written.await;
        };
        let _ = timeout(NOTICE_TIMEOUT, flush).await;
    }
}

/// Output of one service.
#[derive(Clone, Debug)]
pub(super) enum ServiceOutput {
    Writer {
        queue: mpsc::Sender<Message>,
        /// Prefix of lines that the service writes.
        prefix: String,
        /// Prefix of notices about the service.
        name: String,
    },
    Log {
        log: SharedLog,
        service: String,
    },
}

impl ServiceOutput {
    /// Sends lines of the service: `NAME | text`. Waits without a limit while the queue is full.
    async fn write_lines(&self, stream: OutputStream, lines: impl Iterator<Item = String>) {
        match self {
            Self::Writer { queue, prefix, .. } => {
                for line in lines {
                    let _ = queue.send(Message::Line(format!("{prefix} {line}"))).await;
                }
            }
            Self::Log { log, service } => {
                log.append(service, stream, lines);
                // Readers of the log run between two chunks of a service that writes without a
                // pause, on the same thread.
                tokio::task::yield_now().await;
            }
        }
    }

    /// Sends a notice about the service: `NAME text`. Lines of a service cannot imitate it. Drops
    /// the notice if the queue stays full for [`NOTICE_TIMEOUT`], so that a blocked terminal does
    /// not prevent the stop of a service.
    pub(super) async fn notice(&self, text: &str) {
        match self {
            Self::Writer { queue, name, .. } => {
                let line = Message::Line(format!("{name} {text}"));
                let _ = timeout(NOTICE_TIMEOUT, queue.send(line)).await;
            }
            Self::Log { log, service } => {
                log.append(service, OutputStream::Notice, std::iter::once(text.to_owned()));
            }
        }
    }

    /// Sends all lines of `input`, which is the stream `stream` of the service, until its end.
    pub(super) async fn copy(self, mut input: impl AsyncRead + Unpin, stream: OutputStream) {
        let mut splitter = Splitter::default();
        let mut chunk = vec![0; CHUNK];
        while let Ok(read @ 1..) = input.read(&mut chunk).await {
            splitter.feed(&chunk[..read]);
            self.write_lines(stream, std::iter::from_fn(|| splitter.next())).await;
        }
        if let Some(line) = splitter.finish() {
            self.write_lines(stream, std::iter::once(line)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc as std_mpsc;

    struct Lines(std_mpsc::SyncSender<String>, bool);

    impl Output for Lines {
        fn write_line(&mut self, line: &str) -> io::Result<()> {
            self.0.send(line.to_owned()).map_err(io::Error::other)
        }

        fn colours(&self) -> bool {
            self.1
        }
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    #[test]
    fn names_are_padded_and_partial_lines_written() {
        let (sender, lines) = std_mpsc::sync_channel(16);
        run(async {
            let printer = Printer::new(Lines(sender, false));
            printer
                .service_output("db", 0, 3)
                .copy(&b"ready\nno newline"[..], OutputStream::Stdout)
                .await;
            let web = printer.service_output("web", 1, 3);
            web.notice("exited with code 1").await;
            web.copy(&b"\n"[..], OutputStream::Stdout).await;
            printer.flush().await;
        });
        let written_lines: Vec<String> = lines.iter().collect();
        assert_eq!(
            written_lines,
            ["db  | ready", "db  | no newline", "web exited with code 1", "web | "]
        );
    }

    #[test]
    fn names_are_coloured_on_a_terminal_only() {
        let (sender, lines) = std_mpsc::sync_channel(16);
        run(async {
            let printer = Printer::new(Lines(sender, true));
            printer.service_output("web", 0, 3).copy(&b"hi"[..], OutputStream::Stdout).await;
            printer.service_output("db", COLOURS.len(), 3).notice("restarts").await;
            printer.flush().await;
        });
        let written_lines: Vec<String> = lines.iter().collect();
        assert_eq!(written_lines, ["\x1b[36mweb |\x1b[0m hi", "\x1b[36mdb\x1b[0m restarts"]);
    }

    #[test]
    fn a_blocked_terminal_blocks_the_service() {
        // Capacity for one line: the writer blocks on the second one.
        let (sender, lines) = std_mpsc::sync_channel(1);
        let written = run(async {
            let printer = Printer::new(Lines(sender, false));
            let (mut service, pipe) = tokio::io::duplex(1024);
            let reader =
                tokio::spawn(printer.service_output("web", 0, 3).copy(pipe, OutputStream::Stdout));
            let mut written = 0;
            let line = [&[b'x'; 999][..], b"\n"].concat();
            while timeout(
                Duration::from_millis(200),
                tokio::io::AsyncWriteExt::write_all(&mut service, &line),
            )
            .await
            .is_ok()
            {
                written += 1;
                assert!(written < 10 * QUEUE, "the service is never blocked");
            }
            printer.service_output("web", 0, 3).notice("is not written").await;
            reader.abort();
            written
        });
        assert!(written >= QUEUE);
        drop(lines);
    }
}
