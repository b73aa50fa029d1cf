//! Changes of tables, all or nothing.

use crate::encode::{
    INET, batch_begin, batch_end, delete_chain, delete_elements, delete_set, delete_table,
    flush_chain, message, new_chain, new_elements, new_rule, new_set, new_table, request,
};
use crate::identity::{Object, TableIdentity, without_counts};
use crate::socket::NetfilterSocket;
use crate::table::{Chain, Set, Table};
use crate::wire::{Attributes, Message, attribute, attributes, number, text};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;

/// `NFT_TABLE_F_OWNER` (Linux 5.12), `NFT_TABLE_F_PERSIST` (Linux 6.9).
const OWNER: u32 = 2;
const PERSIST: u32 = 4;

/// How often a change is tried that others have come in the way of.
const ATTEMPTS: u32 = 5;

/// A name that nobody else's table has, to try things with.
const TRIAL: &str = "tidegate-trial";

/// A change of what a namespace has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A table comes in the place of what is there under its name.
    Replace {
        /// The table.
        table: Table,
        /// It belongs to this connection: others can neither change nor delete it, and when the
        /// connection ends it stays. Needs a kernel that [can do that](Connection::can_own).
        owned: bool,
    },
    /// A table goes, if it is there.
    Remove {
        /// Its name.
        table: String,
    },
    /// In a table that others use too, some chains and sets come in the place of those of their
    /// names. The table is made if it is missing, and so is `kept`; what is in that chain stays.
    ReplacePart {
        /// The chains and sets, and the table's name.
        part: Table,
        /// A chain that they may jump to.
        kept: String,
    },
    /// Chains and sets of these names go. If nothing of others is left in the table, and nothing in
    /// the chain `kept`, the table goes with them.
    RemovePart {
        /// The table's name.
        table: String,
        /// Of the chains and sets.
        names: BTreeSet<String>,
        /// The chain that is not deleted if it has rules.
        kept: String,
    },
    /// Elements are added to a set, and others deleted from it.
    Elements {
        /// The table's name.
        table: String,
        /// The set with what is added.
        added: Set,
        /// The same set with what is deleted.
        removed: Set,
    },
}

/// A family of tables beside `inet`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableFamily {
    /// `ip`
    Ipv4,
    /// `ip6`
    Ipv6,
}

impl TableFamily {
    /// `NFPROTO_*`, which is `AF_*`.
    pub(crate) const fn number(self) -> u8 {
        match self {
            Self::Ipv4 => 2,
            Self::Ipv6 => 10,
        }
    }
}

/// Why nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused a part of it.
    #[error("{about}: {source}")]
    Refused {
        /// Which part.
        about: String,
        /// Why.
        source: io::Error,
    },
    /// The table belongs to another process, which is running.
    #[error("table {0} belongs to another process; stop that first")]
    Owned(String),
    /// The kernel was not heard.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A table that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// The socket that it belongs to.
    pub owner: Option<u32>,
    /// It stays when that ends.
    pub persists: bool,
}

impl Listed {
    /// Of the attributes of a table.
    fn new(table: &[u8]) -> Self {
        let flags = attribute(table, 2).and_then(number).unwrap_or(0);
        Self {
            name: attribute(table, 1).map(text).unwrap_or_default(),
            owner: attribute(table, 7).and_then(number).filter(|_| flags & OWNER != 0),
            persists: flags & PERSIST != 0,
        }
    }
}

/// A connection to the packet filter of one namespace. The tables that it owns it owns as long as
/// it lives.
pub struct Connection {
    socket: NetfilterSocket,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Connection").field(&self.socket.port()).finish()
    }
}

impl Connection {
    /// Connects to the namespace of the calling thread.
    ///
    /// # Errors
    /// No descriptor is left, or the kernel has no netfilter.
    pub fn open() -> io::Result<Self> {
        Ok(Self { socket: NetfilterSocket::open()? })
    }

    /// Carries all of `changes` out, or none.
    ///
    /// # Errors
    /// [`Error`].
    pub fn commit(&mut self, changes: &[Change]) -> Result<(), Error> {
        self.transact(changes, false).map(drop)
    }

    /// Puts `table` in the place of one of its name, and returns what identifies it and its
    /// contents. It does not belong to this connection. Sets of the table are not part of its
    /// identity, only their number is.
    ///
    /// # Errors
    /// [`Error`].
    pub fn replace(&mut self, table: Table) -> Result<TableIdentity, Error> {
        let objects = self.transact(&[Change::Replace { table, owned: false }], true)?;
        Ok(TableIdentity::new(objects))
    }

    /// Whether the table is as [`replace`](Self::replace) has put it: with the same chains and
    /// rules, as many sets, and not dormant.
    ///
    /// Every object is asked for by its own name or number. A dump of chains lists those of all
    /// tables (`nf_tables_dump_chains`), and a dump is begun again whenever somebody has changed
    /// anything meanwhile.
    ///
    /// # Errors
    /// The kernel's: `EPERM` without the privilege to ask.
    pub fn is_intact(&mut self, identity: &TableIdentity) -> io::Result<bool> {
        for object in identity.objects() {
            match self.find(&object.request())? {
                Some(found) if object.is(&found) => {}
                _ => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Carries all of `changes` out, or none. With `echo` the kernel tells what it has made of it:
    /// tables, chains and rules in the order of their making.
    fn transact(&mut self, changes: &[Change], echo: bool) -> Result<Vec<Object>, Error> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            let mut messages = vec![batch_begin()];
            let mut ids = 0;
            for change in changes {
                self.plan(change, &mut ids, &mut messages)?;
            }
            messages.push(batch_end());
            if echo {
                messages.iter_mut().for_each(Object::have_echoed);
            }
            let mut objects = Vec::new();
            let refused = self.socket.send_all(&messages, |kind, attributes| {
                objects.extend(Object::made(kind, attributes));
            })?;
            let Some(first) = refused.into_iter().next() else { return Ok(objects) };
            // What was there while it was planned was gone when it was done, or the other way
            // round.
            let overtaken = [Errno::NOENT, Errno::EXIST, Errno::BUSY];
            let overtaken =
                Errno::from_io_error(&first.source).is_some_and(|errno| overtaken.contains(&errno));
            if !overtaken || attempt == ATTEMPTS {
                let about = messages[first.index].about.clone();
                return Err(Error::Refused { about, source: first.source });
            }
        }
    }

    /// How many changes this namespace has seen, ours and those of others, modulo 2^32: one more
    /// for each transaction.
    ///
    /// # Errors
    /// As of [`tables`](Self::tables).
    pub fn generation(&mut self) -> io::Result<u32> {
        let answer = self.socket.ask(&list(request::GET_GENERATION, Attributes::default()))?;
        attribute(&answer, 1).and_then(number).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// The tables of the family `inet`.
    ///
    /// # Errors
    /// The kernel's: `EPERM` without the privilege to ask.
    pub fn tables(&mut self) -> io::Result<Vec<Listed>> {
        let mut tables = Vec::new();
        self.socket.dump(&list(request::GET_TABLE, Attributes::default()), |table| {
            tables.push(Listed::new(table));
        })?;
        Ok(tables)
    }

    /// The table `name` of the family `inet`, if it is there.
    fn table(&mut self, name: &str) -> io::Result<Option<Listed>> {
        let asked = list(request::GET_TABLE, Attributes::default().text(1, name));
        Ok(self.find(&asked)?.map(|table| Listed::new(&table)))
    }

    /// Asks for one thing: its attributes, if it is there.
    fn find(&mut self, asked: &Message) -> io::Result<Option<Vec<u8>>> {
        match self.socket.ask(asked) {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NOENT) => Ok(None),
            found => found.map(Some),
        }
    }

    /// Whether the table `name` is there and this connection owns it, so that nobody else can have
    /// changed it.
    ///
    /// # Errors
    /// As of [`tables`](Self::tables).
    pub fn owns(&mut self, name: &str) -> io::Result<bool> {
        let port = self.socket.port();
        Ok(self.table(name)?.is_some_and(|table| table.owner == Some(port)))
    }

    /// Whether this kernel lets tables belong to a connection and stay when it ends. It is tried,
    /// and leaves nothing.
    ///
    /// # Errors
    /// Tables cannot be made at all.
    pub fn can_own(&mut self) -> Result<bool, Error> {
        let trial = |owned| {
            let table = Table { name: TRIAL.to_owned(), ..Table::default() };
            [Change::Replace { table, owned }, Change::Remove { table: TRIAL.to_owned() }]
        };
        let [make, remove] = trial(true);
        if self.commit(&[make]).is_ok() {
            self.commit(&[remove])?;
            return Ok(true);
        }
        let [make, remove] = trial(false);
        self.commit(&[make])?;
        self.commit(&[remove])?;
        Ok(false)
    }

    /// Whether there is a table of that family and name.
    ///
    /// # Errors
    /// As of [`tables`](Self::tables).
    pub fn has_table(&mut self, family: TableFamily, name: &str) -> io::Result<bool> {
        let asked = list(request::GET_TABLE, Attributes::default().text(1, name));
        Ok(self.find(&Message { family: family.number(), ..asked })?.is_some())
    }

    /// Whether there is a chain of that name in the table `table` of that family.
    ///
    /// # Errors
    /// As of [`tables`](Self::tables).
    pub fn has_chain(&mut self, family: TableFamily, table: &str, name: &str) -> io::Result<bool> {
        let asked = list(request::GET_CHAIN, Attributes::default().text(1, table).text(3, name));
        Ok(self.find(&Message { family: family.number(), ..asked })?.is_some())
    }

    /// The base chains of `postrouting` behind `priority` whose tables have a rule that changes
    /// bits of `mask` in a packet mark, as `FAMILY TABLE CHAIN`. About which packets such a rule is
    /// nobody looks.
    ///
    /// # Errors
    /// As of [`tables`](Self::tables).
    pub fn mark_setters(&mut self, priority: i32, mask: u32) -> io::Result<Vec<String>> {
        /// `NF_INET_POST_ROUTING`.
        const POSTROUTING: u32 = 4;
        let mut found = Vec::new();
        for (family, name) in [(INET, "inet"), (2, "ip"), (10, "ip6")] {
            let asked = |request, attributes| Message { family, ..list(request, attributes) };
            let mut chains = Vec::new();
            self.socket.dump(&asked(request::GET_CHAIN, Attributes::default()), |chain| {
                // NFTA_CHAIN_TABLE, _NAME, _HOOK; NFTA_HOOK_HOOKNUM, _PRIORITY
                let of = |kind| attribute(chain, kind).map(text).unwrap_or_default();
                let hook = attribute(chain, 4).unwrap_or_default();
                let number_of = |kind| attribute(hook, kind).and_then(number);
                let is_behind = number_of(2).is_some_and(|at| at.cast_signed() > priority);
                if number_of(1) == Some(POSTROUTING) && is_behind {
                    chains.push((of(1), of(3)));
                }
            })?;
            for (table, chain) in chains {
                let mut sets = false;
                let rules = asked(request::GET_RULE, Attributes::default().text(1, &table));
                // NFTA_RULE_EXPRESSIONS
                self.socket.dump(&rules, |rule| {
                    sets |= sets_mark(attribute(rule, 4).unwrap_or_default(), mask);
                })?;
                if sets {
                    found.push(format!("{name} {table} {chain}"));
                }
            }
        }
        Ok(found)
    }

    /// Removes a table that nobody uses: one without rules, and without a chain that is jumped to
    /// or that drops. Whether it was there and is gone.
    ///
    /// It is for the tables that the variant of iptables makes which is made of nf_tables: it makes
    /// them when they are first asked for, and leaves them.
    ///
    /// # Errors
    /// The kernel was not heard.
    pub fn remove_unused(&mut self, family: TableFamily, name: &str) -> io::Result<bool> {
        /// `NLM_F_NONREC`: only if nothing is in it.
        const IF_EMPTY: u16 = 0x100;
        /// `NF_ACCEPT`.
        const ACCEPT: u32 = 1;
        let of_family = |message: Message| Message { family: family.number(), ..message };
        let mut chains = Vec::new();
        let mut in_use = false;
        let asked = list(request::GET_CHAIN, Attributes::default().text(1, name));
        self.socket.dump(&of_family(asked), |chain| {
            if attribute(chain, 1).map(text).as_deref() == Some(name) {
                in_use |= attribute(chain, 5).and_then(number) != Some(ACCEPT);
                chains.extend(attribute(chain, 3).map(text));
            }
        })?;
        if in_use || chains.is_empty() {
            return Ok(false);
        }
        let mut messages = vec![batch_begin()];
        let deletions =
            chains.iter().map(|chain| delete_chain(name, chain)).chain([delete_table(name)]);
        messages.extend(deletions.map(|message| Message { flags: IF_EMPTY, ..of_family(message) }));
        messages.push(batch_end());
        // Refused: a rule was put there meanwhile.
        Ok(self.socket.send_all(&messages, |_, _| ())?.is_empty())
    }

    /// A number that changes with the table `name`, or with those of its chains and sets that `of`
    /// picks: with each chain, rule, set and element. `None` if the table is not there. Counters do
    /// not change it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn fingerprint(
        &mut self,
        name: &str,
        of: impl Fn(&str) -> bool,
    ) -> io::Result<Option<u64>> {
        if self.table(name)?.is_none() {
            return Ok(None);
        }
        let mut hasher = DefaultHasher::new();
        for chain in self.chains(name)?.into_iter().filter(|chain| of(chain)) {
            chain.hash(&mut hasher);
            self.rules(name, &chain)?.hash(&mut hasher);
        }
        for (set, handle) in self.sets(name)?.into_iter().filter(|(set, _)| of(set)) {
            (&set, handle).hash(&mut hasher);
            // A sum, for they come in no order, and there may be thousands.
            let (mut count, mut sum) = (0_usize, 0_u64);
            let asked = Attributes::default().text(1, name).text(2, &set);
            self.socket.dump(&list(request::GET_ELEMENTS, asked), |answer| {
                for (_, element) in attributes(attribute(answer, 3).unwrap_or_default()) {
                    let mut hasher = DefaultHasher::new();
                    element.hash(&mut hasher);
                    count += 1;
                    sum = sum.wrapping_add(hasher.finish());
                }
            })?;
            (count, sum).hash(&mut hasher);
        }
        Ok(Some(hasher.finish()))
    }

    /// The messages of one change, of what is there now.
    fn plan(
        &mut self,
        change: &Change,
        ids: &mut u32,
        messages: &mut Vec<Message>,
    ) -> Result<(), Error> {
        match change {
            Change::Replace { table, owned } => {
                if self.is_there(&table.name)? {
                    messages.push(delete_table(&table.name));
                }
                messages.push(new_table(&table.name, if *owned { OWNER | PERSIST } else { 0 }));
                contents(table, ids, messages);
            }
            Change::Remove { table } => {
                if self.is_there(table)? {
                    messages.push(delete_table(table));
                }
            }
            Change::ReplacePart { part, kept } => {
                if self.is_there(&part.name)? {
                    let names = part.sets.iter().map(|set| set.name.clone());
                    let names =
                        names.chain(part.chains.iter().map(|chain| chain.name.clone())).collect();
                    self.remove_part(&part.name, &names, messages)?;
                } else {
                    messages.push(new_table(&part.name, 0));
                }
                let kept = Chain { name: kept.clone(), base: None, rules: Vec::new() };
                messages.push(new_chain(&part.name, &kept));
                contents(part, ids, messages);
            }
            Change::RemovePart { table, names, kept } => {
                if !self.is_there(table)? {
                    return Ok(());
                }
                let others = self
                    .chains(table)?
                    .into_iter()
                    .any(|chain| chain != *kept && !names.contains(&chain));
                let others =
                    others || self.sets(table)?.iter().any(|(set, _)| !names.contains(set));
                if others || !self.rules(table, kept)?.is_empty() {
                    self.remove_part(table, names, messages)?;
                } else {
                    messages.push(delete_table(table));
                }
            }
            Change::Elements { table, added, removed } => {
                messages.extend(delete_elements(table, removed));
                messages.extend(new_elements(table, added));
            }
        }
        Ok(())
    }

    fn remove_part(
        &mut self,
        table: &str,
        names: &BTreeSet<String>,
        messages: &mut Vec<Message>,
    ) -> io::Result<()> {
        let chains: Vec<_> =
            self.chains(table)?.into_iter().filter(|chain| names.contains(chain)).collect();
        messages.extend(chains.iter().map(|chain| flush_chain(table, chain)));
        messages.extend(chains.iter().map(|chain| delete_chain(table, chain)));
        let sets = self.sets(table)?;
        let sets = sets.iter().filter(|(set, _)| names.contains(set));
        messages.extend(sets.map(|(set, _)| delete_set(table, set)));
        Ok(())
    }

    /// Whether the table is there, and may be changed.
    fn is_there(&mut self, name: &str) -> Result<bool, Error> {
        let port = self.socket.port();
        match self.table(name)? {
            None => Ok(false),
            Some(Listed { owner: Some(owner), .. }) if owner != port => {
                Err(Error::Owned(name.to_owned()))
            }
            Some(_) => Ok(true),
        }
    }

    /// The names of a table's chains.
    fn chains(&mut self, table: &str) -> io::Result<Vec<String>> {
        let mut chains = Vec::new();
        self.socket.dump(
            &list(request::GET_CHAIN, Attributes::default().text(1, table)),
            |chain| {
                // The kernel tells of all tables.
                if attribute(chain, 1).map(text).as_deref() == Some(table) {
                    chains.extend(attribute(chain, 3).map(text));
                }
            },
        )?;
        Ok(chains)
    }

    /// The names and numbers of a table's sets, but for those without a name that rules have.
    fn sets(&mut self, table: &str) -> io::Result<Vec<(String, Vec<u8>)>> {
        let mut sets = Vec::new();
        self.socket.dump(&list(request::GET_SET, Attributes::default().text(1, table)), |set| {
            /// `NFT_SET_ANONYMOUS`.
            const ANONYMOUS: u32 = 1;
            let flags = attribute(set, 3).and_then(number).unwrap_or(0);
            if let Some(name) = attribute(set, 2).filter(|_| flags & ANONYMOUS == 0) {
                sets.push((text(name), attribute(set, 16).unwrap_or_default().to_vec()));
            }
        })?;
        Ok(sets)
    }

    /// The numbers and expressions of a chain's rules: one that takes the place of another has its
    /// number. Counters are left out.
    fn rules(&mut self, table: &str, chain: &str) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut rules = Vec::new();
        let asked = Attributes::default().text(1, table).text(2, chain);
        self.socket.dump(&list(request::GET_RULE, asked), |rule| {
            let of = |kind| attribute(rule, kind).unwrap_or_default();
            rules.push((of(3).to_vec(), without_counts(of(4))));
        })?;
        Ok(rules)
    }
}

/// Whether a rule of these expressions changes bits of `mask` in the packet mark: `meta mark set`,
/// or a target of iptables that does.
fn sets_mark(expressions: &[u8], mask: u32) -> bool {
    /// `NFT_META_MARK`.
    const MARK: u32 = 3;
    let native = |bytes: Option<&[u8]>| {
        bytes.and_then(|bytes| Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?)))
    };
    // Bits that the value of the register may differ in from what was loaded.
    let mut changed = u32::MAX;
    for (_, expression) in attributes(expressions) {
        // NFTA_EXPR_NAME, NFTA_EXPR_DATA
        let data = attribute(expression, 2).unwrap_or_default();
        let value = |kind| native(attribute(attribute(data, kind).unwrap_or_default(), 1));
        match attribute(expression, 1).map(text).as_deref() {
            // NFTA_BITWISE_MASK, NFTA_BITWISE_XOR
            Some("bitwise") => {
                changed =
                    value(4).zip(value(5)).map_or(u32::MAX, |(kept, flipped)| !kept | flipped);
            }
            // NFTA_META_KEY, NFTA_META_SREG
            Some("meta") if attribute(data, 2).and_then(number) == Some(MARK) => {
                if attribute(data, 3).is_some() && changed & mask != 0 {
                    return true;
                }
                changed = u32::MAX;
            }
            // NFTA_TARGET_NAME, NFTA_TARGET_INFO: `struct xt_mark_tginfo2`
            Some("target") if attribute(data, 1).map(text).as_deref() == Some("MARK") => {
                let info = attribute(data, 3).unwrap_or_default();
                let changes = native(Some(info)).zip(native(info.get(4..)));
                if changes.is_none_or(|(value, cleared)| (value | cleared) & mask != 0) {
                    return true;
                }
            }
            _ => {}
        }
    }
    false
}

fn list(request: u16, attributes: Attributes) -> Message {
    message(request, 0, attributes, String::new())
}

/// Sets, then chains, then rules: each may name those before it.
fn contents(table: &Table, ids: &mut u32, messages: &mut Vec<Message>) {
    for set in &table.sets {
        *ids += 1;
        messages.push(new_set(&table.name, set, *ids));
        messages.extend(new_elements(&table.name, set));
    }
    messages.extend(table.chains.iter().map(|chain| new_chain(&table.name, chain)));
    for chain in &table.chains {
        messages.extend(chain.rules.iter().map(|rule| new_rule(&table.name, &chain.name, rule)));
    }
}
