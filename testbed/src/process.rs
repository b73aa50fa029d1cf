//! A child process that does not outlive its handle, with its output and resource usage.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

pub use rustix::process::Signal;
use rustix::process::{Pid, kill_process, kill_process_group};

use crate::{eventually, procfs};

/// The number of output lines that are kept; older ones are dropped.
const KEPT_LINES: usize = 10_000;

/// Maximum length of a line in bytes; longer ones are split.
const MAX_LINE: u64 = 64 * 1024;

/// A running child process, killed and reaped on drop.
///
/// It leads its own process group. The drop also kills forked processes, unless they moved to
/// another group. If the child has ended before, the drop only reaps it.
///
/// Threads read its standard output and error from the start, so that it never blocks on a full
/// pipe. The last 10,000 lines of both streams are kept in order of arrival.
pub struct Process {
    name: String,
    child: Child,
    output: Arc<Output>,
}

#[derive(Default)]
struct Output {
    state: Mutex<OutputState>,
    changed: Condvar,
}

#[derive(Default)]
struct OutputState {
    lines: VecDeque<String>,
    closed_streams: usize,
}

impl Process {
    /// Starts `command` with captured output and empty standard input.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    #[track_caller]
    pub fn spawn(command: &mut Command) -> Self {
        let name = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("start {name}: {error}"));
        let output = Arc::new(Output::default());
        Output::drain(&output, child.stdout.take().expect("standard output is piped"));
        Output::drain(&output, child.stderr.take().expect("standard error is piped"));
        Self { name, child, output }
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line that contains `pattern`, on either stream, and returns it. Earlier lines
    /// count as well.
    ///
    /// # Panics
    ///
    /// If there is no such line after `timeout`, or the process closes its output before. The
    /// message contains its output.
    #[track_caller]
    pub fn wait_for_line(&self, pattern: &str, timeout: Duration) -> String {
        let deadline = Instant::now() + timeout;
        let mut state = self.output.lock();
        loop {
            if let Some(line) = state.lines.iter().find(|line| line.contains(pattern)) {
                return line.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let over = state.closed_streams == 2;
            if over || left.is_zero() {
                let text = state.text();
                // A panic must not poison the lock for later readers of the output.
                drop(state);
                let why = if over { "ended" } else { "timed out" };
                panic!("{}: {why} without a line with {pattern:?}; output:\n{text}", self.name);
            }
            state = self.output.changed.wait_timeout(state, left).expect("readers do not panic").0;
        }
    }

    /// Waits for the end of both streams and returns the kept lines.
    ///
    /// # Panics
    ///
    /// If a stream is still open after `timeout`, in the process or in one that it started.
    #[track_caller]
    pub fn wait_for_output(&self, timeout: Duration) -> String {
        let state = self.output.lock();
        let waited = self
            .output
            .changed
            .wait_timeout_while(state, timeout, |state| state.closed_streams < 2);
        let (text, open) = {
            let (state, result) = waited.expect("readers do not panic");
            (state.text(), result.timed_out())
        };
        assert!(!open, "{}: output still open after {timeout:?}; output:\n{text}", self.name);
        text
    }

    /// Returns the kept lines of both streams.
    pub fn output(&self) -> String {
        self.output.lock().text()
    }

    /// Returns whether the process is running.
    pub fn is_running(&mut self) -> bool {
        self.try_wait().is_none()
    }

    /// Sends `signal`. This does nothing if the process has ended.
    pub fn signal(&mut self, signal: Signal) {
        // Until `try_wait` reaps the process, its pid cannot be reused.
        if self.is_running() {
            let pid = Pid::from_child(&self.child);
            kill_process(pid, signal)
                .unwrap_or_else(|error| panic!("signal {}: {error}", self.name));
        }
    }

    /// Waits for the process to exit.
    ///
    /// # Panics
    ///
    /// If it is still running after `timeout`.
    #[track_caller]
    pub fn wait(&mut self, timeout: Duration) -> ExitStatus {
        let mut status = None;
        eventually(timeout, || {
            status = self.try_wait();
            status.is_some()
        });
        status.unwrap_or_else(|| {
            panic!("{}: still running after {timeout:?}; output:\n{}", self.name, self.output())
        })
    }

    /// Sends `signal` and waits for the exit.
    ///
    /// # Panics
    ///
    /// If the process is still running after `timeout`.
    #[track_caller]
    pub fn stop(&mut self, signal: Signal, timeout: Duration) -> ExitStatus {
        self.signal(signal);
        self.wait(timeout)
    }

    /// User and system time of all threads and reaped children, in seconds.
    #[track_caller]
    pub fn cpu_seconds(&self) -> f64 {
        self.figure("CPU time", procfs::cpu_seconds)
    }

    /// Resident set size in bytes.
    #[track_caller]
    pub fn rss(&self) -> u64 {
        self.figure("RSS", procfs::rss)
    }

    /// Proportional set size in bytes.
    #[track_caller]
    pub fn pss(&self) -> u64 {
        self.figure("PSS", procfs::pss)
    }

    /// Returns the number of open file descriptors.
    #[track_caller]
    pub fn open_fds(&self) -> usize {
        self.figure("open files", procfs::open_fds)
    }

    #[track_caller]
    fn figure<T>(&self, name: &str, read: impl Fn(u32) -> Option<T>) -> T {
        let value = read(self.pid());
        value.unwrap_or_else(|| {
            panic!(
                "{}: {name} unknown, the process may have ended; output:\n{}",
                self.name,
                self.output()
            )
        })
    }

    fn try_wait(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap_or_else(|error| panic!("wait for {}: {error}", self.name))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Until it is reaped, neither its pid nor its process group can be reused.
        if self.is_running() {
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

impl Output {
    fn lock(&self) -> MutexGuard<'_, OutputState> {
        self.state.lock().expect("readers do not panic")
    }

    /// Starts a thread that reads `stream` to its end, which comes when the last process closes it.
    fn drain(this: &Arc<Self>, stream: impl Read + Send + 'static) {
        let this = Arc::clone(this);
        thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            while let Ok(Some(line)) = read_line(&mut stream) {
                this.lock().push(line);
                this.changed.notify_all();
            }
            this.lock().closed_streams += 1;
            this.changed.notify_all();
        });
    }
}

impl OutputState {
    fn push(&mut self, line: String) {
        if self.lines.len() == KEPT_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    fn text(&self) -> String {
        self.lines.iter().map(|line| format!("{line}\n")).collect()
    }
}

/// A line without its newline, at most [`MAX_LINE`] bytes; `None` at the end of the stream.
fn read_line(stream: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    if stream.take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    if line.last() == Some(&b'\n') {
        line.pop();
    }
    Ok(Some(String::from_utf8_lossy(&line).into_owned()))
}

/// Passes `fd` to the child of `command` as descriptor `number`.
///
/// This is for protocols with fixed descriptors: dockerd passes a status pipe as 3 and a socket as
/// 4 to docker-proxy. The command keeps `fd` open in this process until it is dropped, so drop it
/// before waiting for an end of file.
pub fn pass_fd(command: &mut Command, fd: OwnedFd, number: RawFd) {
    // `Command` opens descriptors when it spawns. All numbers up to the requested one are occupied,
    // so that it uses neither this number nor `fd`.
    let mut occupied = vec![fd];
    let fd = loop {
        let copy = occupied[0].try_clone().expect("duplicate a descriptor");
        if copy.as_raw_fd() > number {
            break copy;
        }
        occupied.push(copy);
    };
    // SAFETY: dup2 is async-signal-safe, and `fd` lives as long as the closure.
    unsafe {
        command.pre_exec(move || {
            let _ = &occupied;
            match libc::dup2(fd.as_raw_fd(), number) {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn shell(script: &str) -> Process {
        Process::spawn(Command::new("sh").args(["-c", script]))
    }

    #[test]
    fn both_streams_are_captured() {
        let mut process = shell("echo one; echo two >&2; exit 3");
        assert_eq!(process.wait_for_line("tw", SOON), "two");
        assert_eq!(process.wait_for_line("on", SOON), "one");
        assert_eq!(process.wait(SOON).code(), Some(3));
        assert_eq!(process.wait_for_output(SOON).lines().count(), 2);
    }

    #[test]
    #[should_panic(expected = "ended without a line with \"never\"; output:\nhello")]
    fn waiting_for_a_line_ends_with_the_process() {
        shell("echo hello").wait_for_line("never", SOON);
    }

    #[test]
    fn a_dropped_process_is_reaped() {
        let process = shell("exec sleep 60");
        let pid = process.pid();
        drop(process);
        assert_eq!(procfs::state(pid), None);
    }

    #[test]
    fn a_dropped_process_kills_forked_processes() {
        let process = shell("sleep 60 & echo forked $!; wait");
        let line = process.wait_for_line("forked", SOON);
        let forked: u32 = line.split(' ').nth(1).unwrap().parse().unwrap();
        assert!(procfs::state(forked).is_some());
        drop(process);
        // The new parent of the orphan may not have reaped it yet.
        assert!(eventually(SOON, || matches!(procfs::state(forked), None | Some('Z'))));
    }

    #[test]
    fn stop_returns_the_status() {
        let mut process = shell("trap 'exit 7' TERM; echo ready; while :; do sleep 0.01; done");
        process.wait_for_line("ready", SOON);
        assert_eq!(process.stop(Signal::TERM, SOON).code(), Some(7));
    }

    #[test]
    fn a_running_process_has_usage_figures() {
        let process = shell("exec sleep 60");
        assert!(process.cpu_seconds() >= 0.0);
        // The memory fluctuates until the shell has executed `sleep`.
        assert!(eventually(SOON, || process.rss() >= process.pss()));
        assert!(process.open_fds() >= 3);
    }

    #[test]
    fn kept_output_is_bounded() {
        let mut state = OutputState::default();
        for number in 0..KEPT_LINES + 5 {
            state.push(number.to_string());
        }
        assert_eq!(state.lines.len(), KEPT_LINES);
        assert_eq!(state.lines[0], "5");
        let long = vec![b'x'; MAX_LINE as usize + 1];
        let first = read_line(&mut &long[..]).unwrap().unwrap();
        assert_eq!(first.len(), MAX_LINE as usize);
    }

    #[test]
    fn a_descriptor_is_passed_as_its_number() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo through >&9"]);
        pass_fd(&mut command, writer.into(), 9);
        let mut process = Process::spawn(&mut command);
        drop(command);
        assert!(process.wait(SOON).success());
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through\n");
    }
}
