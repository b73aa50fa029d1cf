//! Execution of `iptables-save` and `iptables-restore`, with a timeout.

use super::saved::Saved;
use iptables::IPTables;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Access, access};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use std::cell::OnceCell;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

/// Time that a program waits for the xtables lock, in seconds (`--wait`).
const LOCK_WAIT: &str = "5";

/// Timeout of a program. Ten thousand rules take less than one second.
const TIMEOUT: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// The tables with rules of tidegate.
pub(super) const TABLES: [&str; 4] = ["raw", "mangle", "filter", "nat"];

/// Directories of firewall programs, searched in addition to `PATH`.
const SYSTEM_DIRECTORIES: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    /// Base name of the programs. The suffixes `-save` and `-restore` are appended to it.
    pub(super) const fn program(self) -> &'static str {
        match self {
            Self::V4 => "iptables",
            Self::V6 => "ip6tables",
        }
    }

    pub(super) const fn is_v6(self) -> bool {
        matches!(self, Self::V6)
    }
}

/// The failure of an iptables program.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProgramError {
    /// Older than 1.6 (of 2015), which cannot wait for the lock.
    #[error("{0:?} is too old; 1.6 or newer is needed")]
    TooOld(String),
    /// The program did not exit within [`TIMEOUT`] and was killed.
    #[error("{0}: timed out after {seconds} s and was killed", seconds = TIMEOUT.tv_sec)]
    TimedOut(String),
    /// Another program has held the lock for [`LOCK_WAIT`].
    #[error(
        "{0}: another program has held the xtables lock for {LOCK_WAIT} s; retry when it has ended"
    )]
    Locked(String),
    /// The program did not respond within [`TIMEOUT`].
    #[error(
        "{0} -S: no response within {seconds} s; another program may hold the xtables lock",
        seconds = TIMEOUT.tv_sec
    )]
    NoResponse(&'static str),
    /// nft(8) has added rules that the program cannot print.
    #[error(
        "iptables-save: table {0} has rules of nft that iptables cannot print; use --firewall=nftables, or remove them"
    )]
    Unprintable(String),
    /// The program could not be started, or ended without a message.
    #[error("{0}: {1}")]
    Failed(String, String),
    /// The first line of its standard error.
    #[error("{0}")]
    Message(String),
    /// The first line of its standard error, and the input line to which it refers.
    #[error("{message}: {line}")]
    Line { message: String, line: String },
}

impl From<ProgramError> for io::Error {
    /// [`io::ErrorKind::TimedOut`] if a retry may succeed.
    fn from(error: ProgramError) -> Self {
        let kind = match error {
            ProgramError::TimedOut(_) | ProgramError::NoResponse(_) | ProgramError::Locked(_) => {
                io::ErrorKind::TimedOut
            }
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

/// The installed iptables programs of one family.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) family: Family,
    /// Version, as in `iptables v1.8.9 (nf_tables)`.
    pub(super) version: String,
    program: PathBuf,
    save: PathBuf,
    restore: PathBuf,
}

impl Program {
    /// # Errors
    /// The program is not installed, its version cannot be determined, or it is older than 1.6 (of
    /// 2015) and cannot wait for the lock.
    pub(super) fn find(family: Family) -> io::Result<Self> {
        Self::named(family, family.program())
    }

    fn named(family: Family, name: &str) -> io::Result<Self> {
        let [program, save, restore] =
            ["", "-save", "-restore"].map(|end| find(&format!("{name}{end}")));
        let program = program?;
        let version = run(&program, &["--version"], "")?.trim().to_owned();
        if numbers(&version).is_none_or(|numbers| numbers < (1, 6)) {
            return Err(ProgramError::TooOld(version).into());
        }
        Ok(Self { family, version, program, save: save?, restore: restore? })
    }

    /// Returns whether this is the nf_tables variant.
    pub(super) fn uses_nftables(&self) -> bool {
        self.version.contains("nf_tables")
    }

    /// Returns whether the program of `family` is installed.
    pub(super) fn is_installed(family: Family) -> bool {
        find(family.program()).is_ok()
    }

    /// Lists chains and rules of the table `filter`, as `iptables -S` does, in the calling thread's
    /// network namespace. For queries only: changes require the consistent tables of
    /// [`save`](Self::save). The program may wait for the xtables lock indefinitely, so it runs on
    /// a separate thread, which is abandoned after [`TIMEOUT`].
    pub(super) fn list_filter(&self) -> io::Result<Vec<String>> {
        let Some(path) = self.program.to_str().map(str::to_owned) else {
            return Err(io::ErrorKind::InvalidFilename.into());
        };
        let (sender, listed) = mpsc::sync_channel(1);
        // A thread inherits the network namespace of its creator.
        thread::Builder::new().name("tidegate-iptables".into()).spawn(move || {
            // The crate requires a `'static` name. Each call leaks one copy.
            let cmd = Box::leak(path.into_boxed_str());
            let program = IPTables { cmd, has_check: true, has_wait: true, is_numeric: false };
            // The receiver is gone after the timeout.
            let _ = sender.send(program.list_table("filter").map_err(|error| error.to_string()));
        })?;
        let timeout = Duration::from_secs(TIMEOUT.tv_sec.unsigned_abs());
        match listed.recv_timeout(timeout) {
            // The crate does not check the exit status. Every table has policies.
            Ok(Ok(lines)) if lines.iter().any(|line| line.starts_with("-P ")) => Ok(lines),
            Ok(Ok(_)) => Err(io::ErrorKind::Unsupported.into()),
            Ok(Err(error)) => Err(ProgramError::Message(error).into()),
            Err(RecvTimeoutError::Timeout) => {
                Err(ProgramError::NoResponse(self.family.program()).into())
            }
            Err(RecvTimeoutError::Disconnected) => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Lists the rules of one or all tables.
    ///
    /// # Errors
    /// A table cannot be printed.
    pub(super) fn save(&self, table: Option<&str>) -> io::Result<Saved> {
        let saved = self.save_printable(table)?;
        if let Some(table) = saved.unprintable().next() {
            return Err(unprintable_table(table));
        }
        Ok(saved)
    }

    /// Lists the rules of one or all tables, and only the names of tables that cannot be printed.
    /// Depending on the rule, iptables-save reports such a table, or fails for all of them.
    pub(super) fn save_printable(&self, table: Option<&str>) -> io::Result<Saved> {
        let of: &[&str] = match &table {
            Some(table) => &["-t", table],
            None => &[],
        };
        match (run(&self.save, of, ""), table) {
            (Err(error), _) if !self.uses_nftables() || error.kind() == io::ErrorKind::TimedOut => {
                Err(error)
            }
            (Err(_), Some(table)) => Ok(Saved::of_unprintable(table)),
            (Err(_), None) => {
                let tables = TABLES.into_iter().map(|table| self.save_printable(Some(table)));
                tables.collect::<io::Result<Vec<_>>>().map(Saved::joined)
            }
            (Ok(text), _) => Ok(Saved::of(&text)),
        }
    }

    /// Applies `text`.
    pub(super) fn restore(&self, text: &str) -> io::Result<()> {
        run(&self.restore, &["--noflush", "--wait", LOCK_WAIT], text).map(drop).map_err(|error| {
            // The error refers to a line by number; append that line.
            if error.kind() == io::ErrorKind::TimedOut {
                return error;
            }
            let message = error.to_string();
            let number = message.split("line").nth(1).and_then(|rest| {
                rest.trim_start_matches([':', ' '])
                    .split(|c: char| !c.is_ascii_digit())
                    .next()?
                    .parse::<usize>()
                    .ok()
            });
            let line = number.and_then(|number| text.lines().nth(number.checked_sub(1)?));
            match line {
                Some(line) => ProgramError::Line { message, line: line.to_owned() }.into(),
                None => error,
            }
        })
    }
}

/// The programs of one family in both variants, which a host can use side by side.
#[derive(Debug)]
pub(super) struct Variants {
    family: Family,
    /// Those in `PATH`, to which the chains of tidegate belong. Their version is asked for on
    /// demand, which runs a program.
    in_path: OnceCell<Option<Program>>,
}

impl Variants {
    pub(super) fn of(family: Family) -> Self {
        Self { family, in_path: OnceCell::new() }
    }

    fn in_path(&self) -> Option<&Program> {
        self.in_path.get_or_init(|| Program::find(self.family).ok()).as_ref()
    }

    /// Runs `f` with the programs of the nf_tables variant, or of the legacy one.
    ///
    /// # Errors
    /// Those of `f`, and of [`Program::find`].
    pub(super) fn with<T>(
        &self,
        nftables: bool,
        f: impl FnOnce(&Program) -> io::Result<T>,
    ) -> io::Result<T> {
        match self.in_path() {
            Some(program) if program.uses_nftables() == nftables => f(program),
            _ => {
                let end = if nftables { "-nft" } else { "-legacy" };
                f(&Program::named(self.family, &format!("{}{end}", self.family.program()))?)
            }
        }
    }

    /// Returns that of the variant in `PATH`, and that of the other one.
    pub(super) fn ours_first<T>(&self, nftables: T, legacy: T) -> [T; 2] {
        let is_legacy = self.in_path().is_some_and(|program| !program.uses_nftables());
        if is_legacy { [legacy, nftables] } else { [nftables, legacy] }
    }
}

/// The error for a table whose rules cannot be printed.
pub(super) fn unprintable_table(name: &str) -> io::Error {
    ProgramError::Unprintable(name.to_owned()).into()
}

fn find(name: &str) -> io::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut directories = std::env::split_paths(&path).chain(SYSTEM_DIRECTORIES.map(Into::into));
    let is_program = |file: &PathBuf| file.is_file() && access(file, Access::EXEC_OK).is_ok();
    let found = directories.find_map(|directory| Some(directory.join(name)).filter(is_program));
    found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("{name} is not installed")))
}

/// Parses major and minor version.
fn numbers(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split_once(" v")?.1.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Runs `program` with `input` and returns its standard output.
///
/// # Errors
/// The program cannot be started, fails (the first line of its standard error), or exceeds
/// [`TIMEOUT`] and is killed.
fn run(program: &Path, args: &[&str], input: &str) -> io::Result<String> {
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let failed = |what: &str| ProgramError::Failed(name.clone(), what.to_owned());
    let piped = Stdio::piped;
    // In its own process group, because the children of a script would keep the pipes open.
    let mut child = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(piped())
        .stdout(piped())
        .stderr(piped())
        .process_group(0)
        .spawn()
        .map_err(|error| failed(&error.to_string()))?;
    let (mut stdin, stdout, stderr) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take());
    thread::scope(|scope| {
        scope.spawn(move || {
            // The exit status shows whether the input was accepted.
            let _ = stdin.as_mut().map(|stdin| stdin.write_all(input.as_bytes()));
        });
        let output = scope.spawn(|| read(stdout));
        let errors = scope.spawn(|| read(stderr));
        let status = wait(&mut child)?;
        let [output, errors] = [output, errors].map(|thread| thread.join().unwrap_or_default());
        match status {
            None => Err(ProgramError::TimedOut(name.clone()).into()),
            Some(status) if status.success() => Ok(output),
            Some(status) => {
                let message = errors.lines().map(str::trim).find(|line| !line.is_empty());
                // The texts are the same in all versions (the second one is that of the legacy
                // programs), and the exit status 4 also means others.
                let is_locked = |message: &str| {
                    message.contains("holding the xtables lock")
                        || message.starts_with("Can't lock ")
                };
                let error = match message {
                    Some(message) if is_locked(message) => ProgramError::Locked(name.clone()),
                    Some(message) => ProgramError::Message(message.to_owned()),
                    None => failed(&status.to_string()),
                };
                Err(error.into())
            }
        }
    })
}

fn read(from: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    let _ = from.map(|mut from| from.read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Waits for `child`. Returns `None` if it was killed after the timeout.
fn wait(child: &mut Child) -> io::Result<Option<ExitStatus>> {
    let pid = Pid::from_child(child);
    let ended = pidfd_open(pid, PidfdFlags::empty()).and_then(|pidfd| {
        let mut ready = [PollFd::new(&pidfd, PollFlags::IN)];
        poll(&mut ready, Some(&TIMEOUT))
    });
    if matches!(ended, Ok(1..)) {
        return child.wait().map(Some);
    }
    let _ = kill_process_group(pid, Signal::KILL);
    child.wait()?;
    ended.map(|_| None).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_numbers_are_parsed() {
        for (version, expected) in [
            ("iptables v1.8.9 (nf_tables)", Some((1, 8))),
            ("ip6tables v1.4.21", Some((1, 4))),
            ("iptables v1.10.0 (legacy)", Some((1, 10))),
            ("something else", None),
        ] {
            assert_eq!(numbers(version), expected, "{version}");
        }
    }

    #[test]
    fn output_and_error_of_a_program_are_returned() {
        let sh = Path::new("/bin/sh");
        assert_eq!(run(sh, &["-c", "cat"], "text").unwrap(), "text");
        let error = |script: &str| run(sh, &["-c", script], "").unwrap_err().to_string();
        assert_eq!(error("echo; echo wrong >&2; echo more >&2; exit 1"), "wrong");
        assert_eq!(error("exit 3"), "sh: exit status: 3");
        assert!(
            run(Path::new("/no/such/program"), &[], "")
                .unwrap_err()
                .to_string()
                .starts_with("program: No such")
        );
    }

    /// More data than fits into a pipe, in both directions simultaneously.
    #[test]
    fn large_input_and_output_do_not_deadlock() {
        let text = "x".repeat(1 << 20);
        assert_eq!(run(Path::new("/bin/cat"), &[], &text).unwrap().len(), text.len());
    }
}
