//! Where the services' lines go: one writer for all, so that lines never mix.
//!
//! The writer is a thread, since a terminal may take nothing for hours (Ctrl-S) and names, metrics
//! and Ctrl-C have to go on meanwhile. Before it is a queue of [`QUEUE`] lines. Once that is full,
//! whoever has a line waits, stops reading its service's pipe, and so the service waits in its own
//! `write`. Nothing is dropped and nothing piles up.

use super::lines::Splitter;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// Lines between the services and the writer. With lines of 16 KiB, which invalid UTF-8 makes three
/// times as long, that is 3 MiB at the very most.
const QUEUE: usize = 64;

/// What is read from a service at a time.
const CHUNK: usize = 8 * 1024;

/// How long what we have to say about a service waits for a terminal that takes nothing.
const PATIENCE: Duration = Duration::from_secs(1);

/// The colours of names, one after the other: SGR numbers that are legible on black and on white.
const COLOURS: [u8; 6] = [36, 33, 32, 35, 34, 96];

/// Takes the lines of all services, on a thread of its own. May block: the services then wait.
pub trait Output: Send + 'static {
    /// Writes a line, which comes without its newline. After the first error nothing more is
    /// written.
    ///
    /// # Errors
    /// Whoever read this is gone.
    fn write_line(&mut self, line: &str) -> io::Result<()>;

    /// Whether names are to be coloured.
    fn colours(&self) -> bool {
        false
    }
}

/// Standard output; coloured if it is a terminal and `NO_COLOR` is not set
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

/// The writer's queue.
#[derive(Clone, Debug)]
pub(super) struct Printer {
    queue: mpsc::Sender<Message>,
    colours: bool,
}

impl Printer {
    /// Starts the writer, which ends with the last clone and voice.
    pub(super) fn new(mut output: impl Output) -> Self {
        let colours = output.colours();
        let (queue, mut messages) = mpsc::channel(QUEUE);
        std::thread::spawn(move || {
            let mut broken = false;
            while let Some(message) = messages.blocking_recv() {
                match message {
                    // A reader that has gone is no reason to stop the services.
                    Message::Line(line) => broken = broken || output.write_line(&line).is_err(),
                    Message::Flush(done) => drop(done.send(())),
                }
            }
        });
        Self { queue, colours }
    }

    /// The voice of the service that is the `index`th; names are padded to `width` characters.
    pub(super) fn voice(&self, name: &str, index: usize, width: usize) -> Voice {
        let colour = self.colours.then(|| COLOURS[index % COLOURS.len()]);
        let paint = |text: String| match colour {
            Some(colour) => format!("\x1b[{colour}m{text}\x1b[0m"),
            None => text,
        };
        Voice {
            queue: self.queue.clone(),
            prefix: paint(format!("{name:width$} |")),
            name: paint(name.to_owned()),
        }
    }

    /// Waits until what was said so far is written, or the terminal's patience is over.
    pub(super) async fn flush(&self) {
        let (done, written) = oneshot::channel();
        let flush = async {
            let _ = self.queue.send(Message::Flush(done)).await;
            let _ = written.await;
        };
        let _ = timeout(PATIENCE, flush).await;
    }
}

/// What one service's lines begin with.
#[derive(Clone, Debug)]
pub(super) struct Voice {
    queue: mpsc::Sender<Message>,
    prefix: String,
    name: String,
}

impl Voice {
    /// A line that the service wrote: `NAME | text`. Waits for room, as long as it takes.
    async fn wrote(&self, line: &str) {
        let _ = self.queue.send(Message::Line(format!("{} {line}", self.prefix))).await;
    }

    /// A line about the service: `NAME text`, which none of its own can look like. Given up where
    /// there is no room for
    /// [`PATIENCE`]: a stuck terminal must not keep a service from being stopped.
    pub(super) async fn says(&self, text: &str) {
        let line = Message::Line(format!("{} {text}", self.name));
        let _ = timeout(PATIENCE, self.queue.send(line)).await;
    }

    /// Passes on what comes from `stream`, up to its end.
    pub(super) async fn follow(self, mut stream: impl AsyncRead + Unpin) {
        let mut splitter = Splitter::default();
        let mut chunk = vec![0; CHUNK];
        while let Ok(read @ 1..) = stream.read(&mut chunk).await {
            splitter.feed(&chunk[..read]);
            while let Some(line) = splitter.next() {
                self.wrote(&line).await;
            }
        }
        if let Some(line) = splitter.finish() {
            self.wrote(&line).await;
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
    fn names_are_padded_and_partial_lines_told() {
        let (sender, lines) = std_mpsc::sync_channel(16);
        run(async {
            let printer = Printer::new(Lines(sender, false));
            printer.voice("db", 0, 3).follow(&b"ready\nno newline"[..]).await;
            let web = printer.voice("web", 1, 3);
            web.says("exited with code 1").await;
            web.follow(&b"\n"[..]).await;
            printer.flush().await;
        });
        let told: Vec<String> = lines.iter().collect();
        assert_eq!(told, ["db  | ready", "db  | no newline", "web exited with code 1", "web | "]);
    }

    #[test]
    fn names_are_coloured_on_a_terminal_only() {
        let (sender, lines) = std_mpsc::sync_channel(16);
        run(async {
            let printer = Printer::new(Lines(sender, true));
            printer.voice("web", 0, 3).follow(&b"hi"[..]).await;
            printer.voice("db", COLOURS.len(), 3).says("restarts").await;
            printer.flush().await;
        });
        let told: Vec<String> = lines.iter().collect();
        assert_eq!(told, ["\x1b[36mweb |\x1b[0m hi", "\x1b[36mdb\x1b[0m restarts"]);
    }

    #[test]
    fn a_terminal_that_takes_nothing_stops_the_reading() {
        // Room for one: the writer waits with the second line in its hands.
        let (sender, lines) = std_mpsc::sync_channel(1);
        let written = run(async {
            let printer = Printer::new(Lines(sender, false));
            let (mut service, pipe) = tokio::io::duplex(1024);
            let reader = tokio::spawn(printer.voice("web", 0, 3).follow(pipe));
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
                assert!(written < 10 * QUEUE, "the service is never slowed down");
            }
            printer.voice("web", 0, 3).says("cannot be told").await;
            reader.abort();
            written
        });
        assert!(written >= QUEUE);
        drop(lines);
    }
}
