//! Atomic changes of nftables tables.

use crate::encode::{
    INET, batch_begin, batch_end, delete_chain, delete_elements, delete_set, delete_table,
    flush_chain, message, new_chain, new_elements, new_rule, new_set, new_table, request,
};
use crate::identity::{Object, TableIdentity, without_counters};
use crate::table::{Chain, Set, Table};
use crate::wire::open_socket;
use crate::wire::{Attributes, Message, attribute, attributes, number, text};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use tidegate_netlink::NetlinkSocket;

/// `NFT_TABLE_F_OWNER` (Linux 5.12), `NFT_TABLE_F_PERSIST` (Linux 6.9).
const OWNER: u32 = 2;
const PERSIST: u32 = 4;

/// Maximum attempts at a transaction that conflicts with concurrent changes.
const ATTEMPTS: u32 = 5;

/// Name of the temporary table that [`Connection::can_own`] creates.
const TRIAL: &str = "tidegate-trial";

/// A change to the tables of a network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Creates a table, replacing an existing table of the same name.
    Replace {
        /// The table.
        table: Table,
        /// The table is owned by this connection: other processes can neither change nor delete it.
        /// It persists after the connection closes. Requires [kernel support](Connection::can_own).
        owned: bool,
    },
    /// Deletes a table if it exists.
    Remove {
        /// Its name.
        table: String,
    },
    /// Replaces the chains and sets of `part` in a shared table. Creates the table and the chain
    /// `kept` if they are missing; existing rules in `kept` are preserved.
    ReplacePart {
        /// Name of the table, and the chains and sets to replace.
        part: Table,
        /// Name of a chain that the new chains may jump to.
        kept: String,
    },
    /// Deletes the chains and sets in `names`. Also deletes the table if it has no other chains and
    /// sets and the chain `kept` is empty.
    RemovePart {
        /// The table's name.
        table: String,
        /// Names of the chains and sets.
        names: BTreeSet<String>,
        /// Name of the chain that is preserved if it has rules.
        kept: String,
    },
    /// Deletes the elements in `removed` from a set and adds those in `added`.
    Elements {
        /// The table's name.
        table: String,
        /// The set, with the elements to add.
        added: Set,
        /// The same set, with the elements to delete.
        removed: Set,
    },
}

/// A table family other than `inet`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableFamily {
    /// `ip`
    Ipv4,
    /// `ip6`
    Ipv6,
    /// `inet`
    Inet,
}

/// A rule as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedRule {
    /// The chain.
    pub chain: String,
    /// The names of its expressions, as in `payload`, `cmp`, `immediate`.
    pub expressions: Vec<String>,
    /// The chain to which it jumps.
    pub target: Option<String>,
}

impl ListedRule {
    fn of(chain: String, expressions: &[u8]) -> Self {
        let mut listed = Self { chain, expressions: Vec::new(), target: None };
        for (_, expression) in attributes(expressions) {
            // NFTA_EXPR_NAME, _DATA; NFTA_IMMEDIATE_DATA; NFTA_DATA_VERDICT; NFTA_VERDICT_CHAIN
            listed.expressions.extend(attribute(expression, 1).map(text));
            let data = attribute(expression, 2).unwrap_or_default();
            let verdict = attribute(attribute(data, 2).unwrap_or_default(), 2);
            let is_immediate = listed.expressions.last().is_some_and(|name| name == "immediate");
            if let Some(verdict) = verdict.filter(|_| is_immediate) {
                listed.target = attribute(verdict, 2).map(text);
            }
        }
        listed
    }
}

impl TableFamily {
    /// `NFPROTO_*`, equal to `AF_*`.
    pub(crate) const fn number(self) -> u8 {
        match self {
            Self::Ipv4 => 2,
            Self::Ipv6 => 10,
            Self::Inet => INET,
        }
    }
}

/// The cause of a failed transaction, which changed nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel rejected a message of the transaction.
    #[error("{about}: {source}")]
    Refused {
        /// Object of the rejected message.
        about: String,
        /// Error code of the kernel.
        source: io::Error,
    },
    /// The table is owned by another running process.
    #[error("table {0} is owned by another process; stop that process first")]
    Owned(String),
    /// Communication with the kernel failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// An existing table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Netlink port ID of the owner.
    pub owner: Option<u32>,
    /// The table persists after its owner exits.
    pub persists: bool,
    /// All flags (`NFTA_TABLE_FLAGS`).
    flags: u32,
}

impl Listed {
    /// Parses the attributes of a table.
    fn new(table: &[u8]) -> Self {
        let flags = attribute(table, 2).and_then(number).unwrap_or(0);
        Self {
            name: attribute(table, 1).map(text).unwrap_or_default(),
            owner: attribute(table, 7).and_then(number).filter(|_| flags & OWNER != 0),
            persists: flags & PERSIST != 0,
            flags,
        }
    }
}

/// Hook, policy and type of a chain, as the kernel encodes them; `None` for a chain without hook.
type ChainForm = [Option<Vec<u8>>; 3];

/// A connection to the packet filter of one network namespace. Its ownership of tables ends when it
/// is dropped.
pub struct Connection {
    socket: NetlinkSocket,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Connection").field(&self.socket.port()).finish()
    }
}

impl Connection {
    /// Connects to the calling thread's network namespace.
    ///
    /// # Errors
    /// The process is out of file descriptors, or the kernel lacks netfilter.
    pub fn open() -> io::Result<Self> {
        Ok(Self { socket: open_socket()? })
    }

    /// Applies `changes` in one atomic transaction.
    ///
    /// # Errors
    /// [`Error`].
    pub fn commit(&mut self, changes: &[Change]) -> Result<(), Error> {
        self.transact(changes, false).map(drop)
    }

    /// Replaces the table with the name of `table`, or creates it, and returns its identity. This
    /// connection does not own the table. The identity covers the number of the table's sets, but
    /// not their contents.
    ///
    /// # Errors
    /// [`Error`].
    pub fn replace(&mut self, table: Table) -> Result<TableIdentity, Error> {
        let objects = self.transact(&[Change::Replace { table, owned: false }], true)?;
        Ok(TableIdentity::new(objects))
    }

    /// Returns whether the table is unchanged since [`replace`](Self::replace): the same chains and
    /// rules, the same number of sets, and not dormant.
    ///
    /// Requests each object by its name or handle instead of dumping the table: a dump of chains
    /// traverses the chains of all tables (`nf_tables_dump_chains`), and any concurrent change of
    /// the ruleset restarts a dump.
    ///
    /// # Errors
    /// Errors of the kernel; `EPERM` without the privilege for the request.
    pub fn is_intact(&mut self, identity: &TableIdentity) -> io::Result<bool> {
        for object in identity.objects() {
            match self.find(&object.request())? {
                Some(found) if object.matches(&found) => {}
                _ => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Commits `changes` in one transaction. With `echo`, returns the tables, chains and rules that
    /// the kernel created, in order of creation.
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
                messages.iter_mut().for_each(Object::request_echo);
            }
            let mut objects = Vec::new();
            let rejected = self.socket.send_all(&messages, |kind, attributes| {
                objects.extend(Object::from_echo(kind, attributes));
            })?;
            let Some(first) = rejected.into_iter().next() else { return Ok(objects) };
            // A table, chain or set was created or deleted between planning and commit.
            let conflicts = [Errno::NOENT, Errno::EXIST, Errno::BUSY];
            let conflicts =
                Errno::from_io_error(&first.source).is_some_and(|errno| conflicts.contains(&errno));
            if !conflicts || attempt == ATTEMPTS {
                let about = messages[first.index].about.clone();
                return Err(Error::Refused { about, source: first.source });
            }
        }
    }

    /// Returns the ruleset generation of the network namespace. The kernel increments it for every
    /// transaction of any process, modulo 2^32.
    ///
    /// # Errors
    /// Same as [`tables`](Self::tables).
    pub fn generation(&mut self) -> io::Result<u32> {
        let request = list(request::GET_GENERATION, Attributes::default());
        let (_, answer) = self.socket.get(&request)?.unwrap_or_default();
        attribute(&answer, 1).and_then(number).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Lists the tables of the family `inet`.
    ///
    /// # Errors
    /// Errors of the kernel: `EPERM` without CAP_NET_ADMIN.
    pub fn tables(&mut self) -> io::Result<Vec<Listed>> {
        let mut tables = Vec::new();
        self.socket.dump(&list(request::GET_TABLE, Attributes::default()), |_, table| {
            tables.push(Listed::new(table));
        })?;
        Ok(tables)
    }

    /// Returns the table `name` of family `inet`, or `None` if it does not exist.
    fn table(&mut self, name: &str) -> io::Result<Option<Listed>> {
        let request_message = list(request::GET_TABLE, Attributes::default().text(1, name));
        Ok(self.find(&request_message)?.map(|table| Listed::new(&table)))
    }

    /// Requests one object and returns its attributes, or `None` if it does not exist.
    fn find(&mut self, message: &Message) -> io::Result<Option<Vec<u8>>> {
        match self.socket.get(message) {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NOENT) => Ok(None),
            found => found.map(|found| found.map(|(_, attributes)| attributes)),
        }
    }

    /// Returns whether the table `name` exists and is owned by this connection. If so, no other
    /// process can have changed it.
    ///
    /// # Errors
    /// Same as [`tables`](Self::tables).
    pub fn owns(&mut self, name: &str) -> io::Result<bool> {
        let port = self.socket.port();
        Ok(self.table(name)?.is_some_and(|table| table.owner == Some(port)))
    }

    /// Returns whether the kernel supports owned tables that persist. Probes by creating and
    /// deleting a table.
    ///
    /// # Errors
    /// Tables cannot be created at all.
    pub fn can_own(&mut self) -> Result<bool, Error> {
        // The port is unique in the namespace, so instances that start together do not collide.
        let name = format!("{TRIAL}-{}", self.socket.port());
        let trial = |owned| {
            let table = Table { name: name.clone(), ..Table::default() };
            [Change::Replace { table, owned }, Change::Remove { table: name.clone() }]
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

    /// Returns whether the table `name` exists in `family`.
    ///
    /// # Errors
    /// Same as [`tables`](Self::tables).
    pub fn has_table(&mut self, family: TableFamily, name: &str) -> io::Result<bool> {
        let request_message = list(request::GET_TABLE, Attributes::default().text(1, name));
        Ok(self.find(&Message { family: family.number(), ..request_message })?.is_some())
    }

    /// Returns whether the chain `name` exists in `table` of `family`.
    ///
    /// # Errors
    /// Same as [`tables`](Self::tables).
    pub fn has_chain(&mut self, family: TableFamily, table: &str, name: &str) -> io::Result<bool> {
        let request_message =
            list(request::GET_CHAIN, Attributes::default().text(1, table).text(3, name));
        Ok(self.find(&Message { family: family.number(), ..request_message })?.is_some())
    }

    /// Returns whether the base chain `name` in `table` of `family` drops packets by its policy.
    ///
    /// # Errors
    /// Same as [`tables`](Self::tables).
    pub fn drops_by_policy(
        &mut self,
        family: TableFamily,
        table: &str,
        name: &str,
    ) -> io::Result<bool> {
        let mut drops = false;
        let chains = list(request::GET_CHAIN, Attributes::default().text(1, table));
        // NFTA_CHAIN_TABLE, _NAME, _POLICY: `NF_DROP`
        self.socket.dump(&Message { family: family.number(), ..chains }, |_, chain| {
            let is = |kind, value| attribute(chain, kind).map(text).as_deref() == Some(value);
            drops |= is(1, table) && is(3, name) && attribute(chain, 5).and_then(number) == Some(0);
        })?;
        Ok(drops)
    }

    /// Lists the rules of `table` in `family`, in the order of the kernel.
    ///
    /// # Errors
    /// Same as [`tables`](Self::tables).
    pub fn list_rules(&mut self, family: TableFamily, table: &str) -> io::Result<Vec<ListedRule>> {
        let mut rules = Vec::new();
        let request_message = list(request::GET_RULE, Attributes::default().text(1, table));
        // NFTA_RULE_TABLE, _CHAIN, _EXPRESSIONS
        self.socket.dump(&Message { family: family.number(), ..request_message }, |_, rule| {
            let of = |kind| attribute(rule, kind).map(text).unwrap_or_default();
            if of(1) == table {
                let expressions = attribute(rule, 4).unwrap_or_default();
                rules.push(ListedRule::of(of(2), expressions));
            }
        })?;
        Ok(rules)
    }

    /// Lists the `postrouting` base chains with a priority above `priority` that have a rule
    /// setting bits of `mask` in the packet mark, as `FAMILY TABLE CHAIN`. Rules of any chain in
    /// the same table count, and the conditions of the rules are ignored.
    ///
    /// # Errors
    /// Same as [`tables`](Self::tables).
    pub fn mark_setters(&mut self, priority: i32, mask: u32) -> io::Result<Vec<String>> {
        /// `NF_INET_POST_ROUTING`.
        const POSTROUTING: u32 = 4;
        let mut found = Vec::new();
        for (family, name) in [(INET, "inet"), (2, "ip"), (10, "ip6")] {
            let request_message =
                |request, attributes| Message { family, ..list(request, attributes) };
            let mut chains = Vec::new();
            self.socket.dump(
                &request_message(request::GET_CHAIN, Attributes::default()),
                |_, chain| {
                    // NFTA_CHAIN_TABLE, _NAME, _HOOK; NFTA_HOOK_HOOKNUM, _PRIORITY
                    let of = |kind| attribute(chain, kind).map(text).unwrap_or_default();
                    let hook = attribute(chain, 4).unwrap_or_default();
                    let number_of = |kind| attribute(hook, kind).and_then(number);
                    let is_behind = number_of(2).is_some_and(|at| at.cast_signed() > priority);
                    if number_of(1) == Some(POSTROUTING) && is_behind {
                        chains.push((of(1), of(3)));
                    }
                },
            )?;
            for (table, chain) in chains {
                let mut sets = false;
                let rules =
                    request_message(request::GET_RULE, Attributes::default().text(1, &table));
                // NFTA_RULE_EXPRESSIONS
                self.socket.dump(&rules, |_, rule| {
                    sets |= sets_mark(attribute(rule, 4).unwrap_or_default(), mask);
                })?;
                if sets {
                    found.push(format!("{name} {table} {chain}"));
                }
            }
        }
        Ok(found)
    }

    /// Deletes an unused table: one without rules whose chains all have the policy `accept`.
    /// Returns whether a table was deleted.
    ///
    /// iptables-nft creates such tables on first use and never deletes them.
    ///
    /// # Errors
    /// Communication with the kernel failed.
    pub fn remove_unused(&mut self, family: TableFamily, name: &str) -> io::Result<bool> {
        /// `NLM_F_NONREC`: fails unless the object is empty.
        const IF_EMPTY: u16 = 0x100;
        /// `NF_ACCEPT`.
        const ACCEPT: u32 = 1;
        let of_family = |message: Message| Message { family: family.number(), ..message };
        let mut chains = Vec::new();
        let mut in_use = false;
        let request_message = list(request::GET_CHAIN, Attributes::default().text(1, name));
        self.socket.dump(&of_family(request_message), |_, chain| {
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
        // The kernel rejects the deletion of a chain with rules.
        Ok(self.socket.send_all(&messages, |_, _| ())?.is_empty())
    }

    /// Returns a hash over the flags, chains with their hooks and policies, rules, sets and
    /// elements of the table `name`, restricted to the chains and sets whose name satisfies
    /// `filter`. It does not cover counters. Returns `None` if the table does not exist.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn fingerprint(
        &mut self,
        name: &str,
        filter: impl Fn(&str) -> bool,
    ) -> io::Result<Option<u64>> {
        let Some(table) = self.table(name)? else { return Ok(None) };
        let mut hasher = DefaultHasher::new();
        table.flags.hash(&mut hasher);
        for (chain, form) in self.chains(name)?.into_iter().filter(|(chain, _)| filter(chain)) {
            (&chain, form).hash(&mut hasher);
            self.rules(name, &chain)?.hash(&mut hasher);
        }
        for (set, handle) in self.sets(name)?.into_iter().filter(|(set, _)| filter(set)) {
            (&set, handle).hash(&mut hasher);
            // A sum of hashes: elements are listed in no particular order and may number thousands.
            let (mut count, mut sum) = (0_usize, 0_u64);
            let request_message = Attributes::default().text(1, name).text(2, &set);
            self.socket.dump(&list(request::GET_ELEMENTS, request_message), |_, answer| {
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

    /// Appends the messages for one change, based on the current contents of the kernel.
    fn plan(
        &mut self,
        change: &Change,
        ids: &mut u32,
        messages: &mut Vec<Message>,
    ) -> Result<(), Error> {
        match change {
            Change::Replace { table, owned } => {
                if self.exists(&table.name)? {
                    messages.push(delete_table(&table.name));
                }
                messages.push(new_table(&table.name, if *owned { OWNER | PERSIST } else { 0 }));
                contents(table, ids, messages);
            }
            Change::Remove { table } => {
                if self.exists(table)? {
                    messages.push(delete_table(table));
                }
            }
            Change::ReplacePart { part, kept } => {
                if self.exists(&part.name)? {
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
                if !self.exists(table)? {
                    return Ok(());
                }
                let others = self
                    .chain_names(table)?
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
            self.chain_names(table)?.into_iter().filter(|chain| names.contains(chain)).collect();
        messages.extend(chains.iter().map(|chain| flush_chain(table, chain)));
        messages.extend(chains.iter().map(|chain| delete_chain(table, chain)));
        let sets = self.sets(table)?;
        let sets = sets.iter().filter(|(set, _)| names.contains(set));
        messages.extend(sets.map(|(set, _)| delete_set(table, set)));
        Ok(())
    }

    /// Returns whether the table exists. Fails if another process owns it.
    fn exists(&mut self, name: &str) -> Result<bool, Error> {
        let port = self.socket.port();
        match self.table(name)? {
            None => Ok(false),
            Some(Listed { owner: Some(owner), .. }) if owner != port => {
                Err(Error::Owned(name.to_owned()))
            }
            Some(_) => Ok(true),
        }
    }

    /// Lists the chains of a table.
    fn chain_names(&mut self, table: &str) -> io::Result<Vec<String>> {
        Ok(self.chains(table)?.into_iter().map(|(name, _)| name).collect())
    }

    /// Lists the chains of a table: the name, and the attributes for hook, policy and type.
    fn chains(&mut self, table: &str) -> io::Result<Vec<(String, ChainForm)>> {
        /// `NFTA_CHAIN_HOOK`, `NFTA_CHAIN_POLICY`, `NFTA_CHAIN_TYPE`.
        const FORM: [u16; 3] = [4, 5, 7];
        let mut chains = Vec::new();
        self.socket.dump(
            &list(request::GET_CHAIN, Attributes::default().text(1, table)),
            |_, chain| {
                // The kernel lists the chains of all tables.
                if attribute(chain, 1).map(text).as_deref() == Some(table)
                    && let Some(name) = attribute(chain, 3)
                {
                    let form = FORM.map(|kind| attribute(chain, kind).map(<[u8]>::to_vec));
                    chains.push((text(name), form));
                }
            },
        )?;
        Ok(chains)
    }

    /// Lists the named sets of a table, with their handles. Anonymous sets belong to rules.
    fn sets(&mut self, table: &str) -> io::Result<Vec<(String, Vec<u8>)>> {
        let mut sets = Vec::new();
        self.socket.dump(
            &list(request::GET_SET, Attributes::default().text(1, table)),
            |_, set| {
                /// `NFT_SET_ANONYMOUS`.
                const ANONYMOUS: u32 = 1;
                let flags = attribute(set, 3).and_then(number).unwrap_or(0);
                if let Some(name) = attribute(set, 2).filter(|_| flags & ANONYMOUS == 0) {
                    sets.push((text(name), attribute(set, 16).unwrap_or_default().to_vec()));
                }
            },
        )?;
        Ok(sets)
    }

    /// Lists the handles and the expressions, without counters, of the rules of a chain. The handle
    /// alone does not identify a rule: a replacement keeps it (`nf_tables_newrule`).
    fn rules(&mut self, table: &str, chain: &str) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut rules = Vec::new();
        let request_message = Attributes::default().text(1, table).text(2, chain);
        self.socket.dump(&list(request::GET_RULE, request_message), |_, rule| {
            let of = |kind| attribute(rule, kind).unwrap_or_default();
            rules.push((of(3).to_vec(), without_counters(of(4))));
        })?;
        Ok(rules)
    }
}

/// Returns whether a rule with these expressions changes bits of `mask` in the packet mark, by
/// `meta mark set` or by the iptables target MARK.
fn sets_mark(expressions: &[u8], mask: u32) -> bool {
    /// `NFT_META_MARK`.
    const MARK: u32 = 3;
    let native = |bytes: Option<&[u8]>| {
        bytes.and_then(|bytes| Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?)))
    };
    // Bits of the register that may differ from the loaded value.
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

/// Order: sets, chains, rules. Each may reference the preceding ones.
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
