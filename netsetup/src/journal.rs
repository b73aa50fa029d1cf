//! What was made, written down before it is made.
//!
//! One file for each owner, a JSON value on each line: who writes, then each operation. "add" is
//! written before the kernel is asked, for all operations of a plan at once, "remove" after it has
//! done it: so a fact that may be true is always in the file, whenever the process ends. What the
//! file says twice, or says although it never came to be, does no harm: removing what is not there
//! is no error. With the removal of a link goes what was on it, without a line of its own.
//!
//! The file lives in a directory that does not survive a reboot, as the things it tells of do not.
//! It is locked (flock(2)) for as long as its owner lives; the lock goes with the process, however
//! that ends.

use crate::world::outlasts;
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

/// Lines after which the file is written anew, if they tell of less than half as many facts.
const COMPACT_FROM: usize = 4096;

/// One line.
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

/// `lines` as they stand in the file, and how many.
fn text<'a>(lines: impl IntoIterator<Item = Line<'a>>) -> io::Result<(Vec<u8>, usize)> {
    let (mut text, mut count) = (Vec::new(), 0);
    for line in lines {
        serde_json::to_writer(&mut text, &line)?;
        text.push(b'\n');
        count += 1;
    }
    Ok((text, count))
}

/// The journal of one owner, locked.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    facts: Vec<Fact>,
    lines: usize,
}

impl Journal {
    /// Opens the journal at `path`, making it and its directory if need be, and reads what it
    /// tells.
    ///
    /// # Errors
    /// [`JournalError::InUse`] if another process has it; [`JournalError`] otherwise.
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

    /// What may be true because of its owner, in the order in which it was made.
    #[must_use]
    pub fn facts(&self) -> &[Fact] {
        &self.facts
    }

    /// To be called before the first of `ops` is carried out.
    pub(crate) fn before(&mut self, ops: &[Op]) -> Result<(), JournalError> {
        let added: Vec<&Fact> = ops.iter().filter_map(Op::added).collect();
        self.write(added.iter().map(|fact| Line::Add(Cow::Borrowed(fact))))?;
        self.facts.extend(added.into_iter().cloned());
        Ok(())
    }

    /// To be called after the last of `ops` was carried out.
    pub(crate) fn after(&mut self, ops: &[Op]) -> Result<(), JournalError> {
        let removed: BTreeSet<&Fact> =
            ops.iter().filter(|op| op.added().is_none()).map(Op::fact).collect();
        if removed.is_empty() {
            return Ok(());
        }
        self.write(removed.iter().map(|fact| Line::Remove(Cow::Borrowed(fact))))?;
        self.facts.retain(outlasts(&removed));
        if self.lines > COMPACT_FROM && self.facts.len() < self.lines / 2 {
            self.compact()?;
        }
        Ok(())
    }

    /// To be called when none of its facts is true any more.
    pub(crate) fn forget_all(&mut self) -> Result<(), JournalError> {
        if self.facts.is_empty() {
            return Ok(());
        }
        self.facts.clear();
        self.compact()
    }

    /// Deletes the file: nothing of its owner's is left.
    ///
    /// # Errors
    /// What unlink(2) says.
    pub fn finish(self) -> Result<(), JournalError> {
        fs::remove_file(&self.path)
            .map_err(|source| JournalError::Io { path: self.path.clone(), source })
    }

    /// Appends `lines`, in one write(2).
    fn write<'a>(&mut self, lines: impl IntoIterator<Item = Line<'a>>) -> Result<(), JournalError> {
        let failed = |source| JournalError::Io { path: self.path.clone(), source };
        let (text, count) = text(lines).map_err(failed)?;
        self.file.write_all(&text).map_err(failed)?;
        self.lines += count;
        Ok(())
    }

    /// Writes down what is true, and nothing of what was.
    fn compact(&mut self) -> Result<(), JournalError> {
        let failed = |source| JournalError::Io { path: self.path.clone(), source };
        let facts = self.facts.iter().map(|fact| Line::Add(Cow::Borrowed(fact)));
        let (text, lines) =
            text(std::iter::once(Line::this_process()).chain(facts)).map_err(failed)?;
        let new = self.path.with_extension("new");
        let _ = fs::remove_file(&new);
        let mut file = create(&new).map_err(failed)?;
        // Locked before it takes the name: whoever opens it from then on has to wait.
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

/// Opens and locks the file that is at `path`.
fn lock(path: &Path) -> Result<File, JournalError> {
    match lock_file(path).map_err(|source| JournalError::Io { path: path.to_owned(), source })? {
        Lock::Acquired(file) => Ok(file),
        Lock::Held(file) => {
            Err(JournalError::InUse { path: path.to_owned(), holder: holder(&file) })
        }
    }
}

/// Who wrote last that it owns the file.
fn holder(file: &File) -> u32 {
    let lines = BufReader::new(file).lines().map_while(Result::ok);
    let owners = lines.filter_map(|line| match serde_json::from_str(&line) {
        Ok(Line::Owner { pid }) => Some(pid),
        _ => None,
    });
    owners.last().unwrap_or(0)
}

/// The facts that the file leaves, and how many lines it has.
///
/// A last line without an end was being written when its owner was killed: nothing of what it tells
/// was done yet, and it is cut off.
fn read(path: &Path, file: &mut File) -> Result<(Vec<Fact>, usize), JournalError> {
    let failed = |source| JournalError::Io { path: path.to_owned(), source };
    let mut text = Vec::new();
    file.read_to_end(&mut text).map_err(failed)?;
    let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
    if whole < text.len() {
        file.set_len(whole as u64).map_err(failed)?;
    }
    let mut facts: Vec<Fact> = Vec::new();
    let mut lines = 0;
    for line in text[..whole].split_inclusive(|byte| *byte == b'\n') {
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
    fn what_was_added_and_not_removed_is_there_the_next_time() {
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
    fn a_second_owner_is_told_who_the_first_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("demo.journal");
        let _journal = Journal::open(&path).unwrap();
        match Journal::open(&path).unwrap_err() {
            JournalError::InUse { holder, .. } => assert_eq!(holder, std::process::id()),
            error => panic!("{error}"),
        }
    }

    #[test]
    fn it_does_not_grow_with_what_has_come_and_gone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("demo.journal");
        let mut journal = Journal::open(&path).unwrap();
        journal.before(&[Op::Add(up("stays"))]).unwrap();
        for number in 0..3 * COMPACT_FROM {
            let fact = up(&number.to_string());
            journal.before(&[Op::Add(fact.clone())]).unwrap();
            journal.after(&[Op::Remove(fact)]).unwrap();
        }
        assert!(journal.lines <= COMPACT_FROM + 2);
        assert!(
            matches!(Journal::open(&path), Err(JournalError::InUse { .. })),
            "the new file is locked as well"
        );
        drop(journal);
        assert_eq!(Journal::open(&path).unwrap().facts(), [up("stays")]);
    }

    #[test]
    fn with_a_link_goes_what_was_on_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("demo.journal");
        let mut journal = Journal::open(&path).unwrap();
        let mac = crate::Mac([2, 0, 0, 0, 0, 1]);
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
    fn a_line_that_was_being_written_counts_for_nothing() {
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
    fn a_damaged_line_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("demo.journal");
        fs::write(&path, "{\"owner\":{\"pid\":1}}\nnonsense\n").unwrap();
        assert!(matches!(Journal::open(&path), Err(JournalError::Damaged { line: 2, .. })));
    }
}
