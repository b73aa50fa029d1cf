//! A write-ahead journal of created kernel objects.
//!
//! Each owner has one file with a JSON value per line: the owning process, then the operations. An
//! "add" line is written before the operation, for all operations of a plan at once; a "remove"
//! line is written after the operation. Every fact that may hold is therefore in the file, whenever
//! the process ends. Duplicate lines and facts that never held are harmless, because removing a
//! missing object is not an error. Removing a link implies the removal of the facts on it, without
//! separate lines.
//!
//! The file is in a directory that is emptied by a reboot, like the kernel state it describes. It
//! is locked with flock(2) while its owner lives; the kernel releases the lock when the process
//! ends for any reason.

use crate::kernel_model::outlasts;
use crate::{Fact, JournalError, Op};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use tidegate_netns::{Lock, lock_file};

/// Number of lines after which the file is rewritten, if it has fewer than half as many facts.
const COMPACTION_THRESHOLD: usize = 4096;

/// A line of the file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line<'a> {
    Owner { pid: u32 },
    Add(Cow<'a, Fact>),
    Remove(Cow<'a, Fact>),
}

impl Line<'_> {
    fn this_process() -> Self {
        Self::Owner { pid: std::process::id() }
    }
}

/// Encodes `lines` and counts them.
fn text<'a>(lines: impl IntoIterator<Item = Line<'a>>) -> io::Result<(Vec<u8>, usize)> {
    let (mut text, mut count) = (Vec::new(), 0);
    for line in lines {
        serde_json::to_writer(&mut text, &line)?;
        text.push(b'\n');
        count += 1;
    }
    Ok((text, count))
}

/// The locked journal of one owner.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    facts: Vec<Fact>,
    lines: usize,
}

impl Journal {
    /// Opens and reads the journal at `path`. Creates the file and its directory if they are
    /// missing.
    ///
    /// # Errors
    /// [`JournalError::InUse`] if another process holds the lock, or another [`JournalError`].
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        let failed = |source| JournalError::Io { path: path.to_owned(), source };
        if let Some(directory) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(failed)?;
        }
        let mut file = lock(path)?;
        let (facts, lines) = read(path, &mut file)?;
        let mut journal = Self { path: path.to_owned(), file, facts, lines };
        journal.write([Line::this_process()])?;
        Ok(journal)
    }

    /// Returns the facts of the owner that may hold, in order of creation.
    #[must_use]
    pub fn facts(&self) -> &[Fact] {
        &self.facts
    }

    /// Must be called before the first of `ops` is performed.
    pub(crate) fn before(&mut self, ops: &[Op]) -> Result<(), JournalError> {
        let added: Vec<&Fact> = ops.iter().filter_map(Op::added).collect();
        self.write(added.iter().map(|fact| Line::Add(Cow::Borrowed(fact))))?;
        self.facts.extend(added.into_iter().cloned());
        Ok(())
    }

    /// Must be called after the last of `ops` was performed.
    pub(crate) fn after(&mut self, ops: &[Op]) -> Result<(), JournalError> {
        let removed: BTreeSet<&Fact> =
            ops.iter().filter(|op| op.added().is_none()).map(Op::fact).collect();
        if removed.is_empty() {
            return Ok(());
        }
        self.write(removed.iter().map(|fact| Line::Remove(Cow::Borrowed(fact))))?;
        self.facts.retain(outlasts(&removed));
        if self.lines > COMPACTION_THRESHOLD && self.facts.len() < self.lines / 2 {
            self.compact()?;
        }
        Ok(())
    }

    /// Clears the journal. Must be called when none of its facts holds any more.
    pub(crate) fn clear(&mut self) -> Result<(), JournalError> {
        if self.facts.is_empty() {
            return Ok(());
        }
        self.facts.clear();
        self.compact()
    }

    /// Deletes the file after all facts of the owner were removed.
    ///
    /// # Errors
    /// Errors of unlink(2).
    pub fn finish(self) -> Result<(), JournalError> {
        fs::remove_file(&self.path)
            .map_err(|source| JournalError::Io { path: self.path.clone(), source })
    }

    /// Appends `lines` in one write(2).
    fn write<'a>(&mut self, lines: impl IntoIterator<Item = Line<'a>>) -> Result<(), JournalError> {
        let failed = |source| JournalError::Io { path: self.path.clone(), source };
        let (text, count) = text(lines).map_err(failed)?;
        self.file.write_all(&text).map_err(failed)?;
        self.lines += count;
        Ok(())
    }

    /// Rewrites the file with the current facts only.
    fn compact(&mut self) -> Result<(), JournalError> {
        let failed = |source| JournalError::Io { path: self.path.clone(), source };
        let facts = self.facts.iter().map(|fact| Line::Add(Cow::Borrowed(fact)));
        let (text, lines) =
            text(std::iter::once(Line::this_process()).chain(facts)).map_err(failed)?;
        let new = self.path.with_extension("new");
        let _ = fs::remove_file(&new);
        let mut file = create(&new).map_err(failed)?;
        // Locked before the rename, so that the file is never unlocked under its final name.
        flock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|errno| failed(errno.into()))?;
        file.write_all(&text).and_then(|()| fs::rename(&new, &self.path)).map_err(failed)?;
        self.file = file;
        self.lines = lines;
        Ok(())
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)
}

/// Opens and locks the file at `path`.
fn lock(path: &Path) -> Result<File, JournalError> {
    match lock_file(path).map_err(|source| JournalError::Io { path: path.to_owned(), source })? {
        Lock::Acquired(file) => Ok(file),
        Lock::Held(file) => {
            Err(JournalError::InUse { path: path.to_owned(), holder: holder(&file) })
        }
    }
}

/// Returns the PID of the last recorded owner, or 0.
fn holder(file: &File) -> u32 {
    let lines = BufReader::new(file).lines().map_while(Result::ok);
    let owners = lines.filter_map(|line| match serde_json::from_str(&line) {
        Ok(Line::Owner { pid }) => Some(pid),
        _ => None,
    });
    owners.last().unwrap_or(0)
}

/// Reads the remaining facts and the number of lines.
///
/// A last line without a newline was incomplete when its owner was killed. Its operation had not
/// started, so it is truncated.
fn read(path: &Path, file: &mut File) -> Result<(Vec<Fact>, usize), JournalError> {
    let failed = |source| JournalError::Io { path: path.to_owned(), source };
    let mut text = Vec::new();
    file.read_to_end(&mut text).map_err(failed)?;
    let complete = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
    if complete < text.len() {
        file.set_len(complete as u64).map_err(failed)?;
    }
    let mut facts: Vec<Fact> = Vec::new();
    let mut lines = 0;
    for line in text[..complete].split_inclusive(|byte| *byte == b'\n') {
        lines += 1;
        match serde_json::from_slice(line) {
            Ok(Line::Owner { .. }) => {}
            Ok(Line::Add(fact)) => facts.push(fact.into_owned()),
            Ok(Line::Remove(fact)) => facts.retain(outlasts(&BTreeSet::from([&*fact]))),
            Err(source) => {
                return Err(JournalError::Damaged { path: path.to_owned(), line: lines, source });
            }
        }
    }
    Ok((facts, lines))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Place;

    fn up(link: &str) -> Fact {
        Fact::Up { place: Place::Host, link: link.into() }
    }

    #[test]
    fn added_facts_are_restored_unless_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/demo.journal");
        let mut journal = Journal::open(&path).unwrap();
        for link in ["a", "b", "c"] {
            journal.before(&[Op::Add(up(link))]).unwrap();
        }
        journal.after(&[Op::Remove(up("b"))]).unwrap();
        drop(journal);
        let journal = Journal::open(&path).unwrap();
        assert_eq!(journal.facts(), [up("a"), up("c")]);
        journal.finish().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn error_names_the_current_owner() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("demo.journal");
        let _journal = Journal::open(&path).unwrap();
        match Journal::open(&path).unwrap_err() {
            JournalError::InUse { holder, .. } => assert_eq!(holder, std::process::id()),
            error => panic!("{error}"),
        }
    }

    #[test]
    fn removed_facts_are_compacted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("demo.journal");
        let mut journal = Journal::open(&path).unwrap();
        journal.before(&[Op::Add(up("stays"))]).unwrap();
        for number in 0..3 * COMPACTION_THRESHOLD {
            let fact = up(&number.to_string());
            journal.before(&[Op::Add(fact.clone())]).unwrap();
            journal.after(&[Op::Remove(fact)]).unwrap();
        }
        assert!(journal.lines <= COMPACTION_THRESHOLD + 2);
        assert!(
            matches!(Journal::open(&path), Err(JournalError::InUse { .. })),
            "the new file is locked as well"
        );
        drop(journal);
        assert_eq!(Journal::open(&path).unwrap().facts(), [up("stays")]);
    }

    #[test]
    fn removing_a_link_removes_the_facts_on_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("demo.journal");
        let mut journal = Journal::open(&path).unwrap();
        let mac = tidegate_model::MacAddress([2, 0, 0, 0, 0, 1]);
        let bridge = Fact::Bridge {
            interface: crate::Interface { name: "a".into(), mac },
            mtu: 1500,
            internal: false,
        };
        journal.before(&[bridge.clone(), up("a"), up("b")].map(Op::Add)).unwrap();
        journal.after(&[Op::Remove(bridge)]).unwrap();
        assert_eq!(journal.facts(), [up("b")]);
        drop(journal);
        assert_eq!(Journal::open(&path).unwrap().facts(), [up("b")]);
    }

    #[test]
    fn incomplete_line_is_ignored() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("demo.journal");
        let mut journal = Journal::open(&path).unwrap();
        journal.before(&[Op::Add(up("a")), Op::Add(up("b"))]).unwrap();
        let length = fs::metadata(&path).unwrap().len();
        drop(journal);
        OpenOptions::new().write(true).open(&path).unwrap().set_len(length - 3).unwrap();
        let mut journal = Journal::open(&path).unwrap();
        assert_eq!(journal.facts(), [up("a")]);
        journal.before(&[Op::Add(up("c"))]).unwrap();
        drop(journal);
        assert_eq!(Journal::open(&path).unwrap().facts(), [up("a"), up("c")]);
    }

    #[test]
    fn error_names_the_invalid_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("demo.journal");
        fs::write(&path, "{\"owner\":{\"pid\":1}}\nnonsense\n").unwrap();
        assert!(matches!(Journal::open(&path), Err(JournalError::Damaged { line: 2, .. })));
    }
}
