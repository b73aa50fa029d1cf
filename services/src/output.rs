//! Output of the services, through one writer, so that lines are never interleaved.
//!
//! The writer is a thread, because a terminal can block for hours (Ctrl-S), and DNS, metrics and
//! signals must keep working. A queue of [`QUEUE`] lines precedes it. While the queue is full, the
//! pipes of the services are not read, so services block in write(2). No line is dropped, and
//! memory use is bounded.

use super::lines::Splitter;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::{mpsc, oneshot};
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

enum Message {
    Line(String),
    Flush(oneshot::Sender<()>),
}

/// The sending side of the writer's queue.
#[derive(Clone, Debug)]
pub(super) struct Printer {
    queue: mpsc::Sender<Message>,
    colours: bool,
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
        Self { queue, colours }
    }

    /// Returns the output of service `name`. `index` selects its colour. Names are padded to
    /// `width` characters.
    pub(super) fn service_output(&self, name: &str, index: usize, width: usize) -> ServiceOutput {
        let colour = self.colours.then(|| COLOURS[index % COLOURS.len()]);
        let paint = |text: String| match colour {
            Some(colour) => format!("\x1b[{colour}m{text}\x1b[0m"),
            None => text,
        };
        ServiceOutput {
            queue: self.queue.clone(),
            prefix: paint(format!("{name:width$} |")),
            name: paint(name.to_owned()),
        }
    }

    /// Waits until all lines sent so far are written, at most [`NOTICE_TIMEOUT`].
    pub(super) async fn flush(&self) {
        let (done, written) = oneshot::channel();
        let flush = async {
            let _ = self.queue.send(Message::Flush(done)).await;
            let _ = written.await;
        };
        let _ = timeout(NOTICE_TIMEOUT, flush).await;
    }
}

/// Output of one service.
#[derive(Clone, Debug)]
pub(super) struct ServiceOutput {
    queue: mpsc::Sender<Message>,
    /// Prefix of lines that the service writes.
    prefix: String,
    /// Prefix of notices about the service.
    name: String,
}

impl ServiceOutput {
    /// Sends a line of the service: `NAME | text`. Waits without a limit while the queue is full.
    async fn write_line(&self, line: &str) {
        let _ = self.queue.send(Message::Line(format!("{} {line}", self.prefix))).await;
    }

    /// Sends a notice about the service: `NAME text`. Lines of a service cannot imitate it. Drops
    /// the notice if the queue stays full for [`NOTICE_TIMEOUT`], so that a blocked terminal does
    /// not prevent the stop of a service.
    pub(super) async fn notice(&self, text: &str) {
        let line = Message::Line(format!("{} {text}", self.name));
        let _ = timeout(NOTICE_TIMEOUT, self.queue.send(line)).await;
    }

    /// Sends all lines of `stream` until its end.
    pub(super) async fn copy(self, mut stream: impl AsyncRead + Unpin) {
        let mut splitter = Splitter::default();
        let mut chunk = vec![0; CHUNK];
        while let Ok(read @ 1..) = stream.read(&mut chunk).await {
            splitter.feed(&chunk[..read]);
            while let Some(line) = splitter.next() {
                self.write_line(&line).await;
            }
        }
        if let Some(line) = splitter.finish() {
            self.write_line(&line).await;
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
            printer.service_output("db", 0, 3).copy(&b"ready\nno newline"[..]).await;
            let web = printer.service_output("web", 1, 3);
            web.notice("exited with code 1").await;
            web.copy(&b"\n"[..]).await;
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
            printer.service_output("web", 0, 3).copy(&b"hi"[..]).await;
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
            let reader = tokio::spawn(printer.service_output("web", 0, 3).copy(pipe));
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
