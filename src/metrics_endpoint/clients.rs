//! The clients of the metrics listener, and which of them yields at a limit. Pure.
//!
//! # Theory of operation
//!
//! ```text
//! accepted ──► silent ──request──► answered ──► closed
//!                │                    │
//!                └──────► evicted ◄───┘
//! ```
//!
//! A client is *silent* until its request is complete. There is always room for a new one: at the
//! limit of silent clients, the oldest one of the largest holder is evicted. A *holder* is
//! everybody who shares a limit: a local user, or an address ([`Holder`]).
//!
//! A holder may have one more answer as long as [`may_take`] says so: one greedy holder gets two
//! thirds, and the rest stays free for others without a running answer being cut. Where several
//! greedy holders leave no place free, the oldest answer of the largest holder yields to a holder
//! that has fewer.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use tidegate_model::may_take;

/// Who shares a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Holder {
    /// The processes of a user of this host.
    User(u32),
    /// Processes of this host whose user is not known.
    Local,
    /// An IPv4 address, or the first address of an IPv6 /64.
    Address(IpAddr),
}

/// For the log, which names no address of a client.
impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(uid) => write!(f, "user {uid} of this host"),
            Self::Local => f.write_str("a user of this host"),
            Self::Address(_) => f.write_str("another host"),
        }
    }
}

/// A client, in the order in which they were accepted.
pub(super) type Id = u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Client {
    holder: Holder,
    answered: bool,
}

/// How a request is received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begin {
    /// It is answered.
    Answer,
    /// It is answered in the place of this client, which is evicted.
    InPlaceOf(Id, Holder),
    /// There are too many answers.
    Refuse,
}

/// All clients.
#[derive(Debug)]
pub(super) struct Clients {
    /// Clients that are silent at once, one at least.
    silent: usize,
    /// Clients that are answered at once, one at least.
    answers: usize,
    clients: BTreeMap<Id, Client>,
    next: Id,
}

impl Clients {
    pub(super) fn new(silent: usize, answers: usize) -> Self {
        Self { silent: silent.max(1), answers: answers.max(1), clients: BTreeMap::new(), next: 0 }
    }

    /// Accepts a client of `holder`, and evicts a silent one if there are too many.
    pub(super) fn accept(&mut self, holder: Holder) -> (Id, Option<(Id, Holder)>) {
        let id = self.next;
        self.next += 1;
        self.clients.insert(id, Client { holder, answered: false });
        let evicted = (self.count(false) > self.silent).then(|| self.evict(false)).flatten();
        (id, evicted)
    }

    /// The request of the silent client `id` is complete.
    pub(super) fn begin(&mut self, id: Id) -> Begin {
        let Some(holder) = self.clients.get(&id).map(|client| client.holder) else {
            return Begin::Refuse;
        };
        let by = self.by_holder(true);
        let held = by.get(&holder).copied().unwrap_or(0);
        let free = self.answers.saturating_sub(self.count(true));
        let largest = by.values().copied().max().unwrap_or(0);
        let begin = if may_take(held, free) {
            Begin::Answer
        } else if free == 0 && largest > held + 1 {
            self.evict(true).map_or(Begin::Refuse, |(id, holder)| Begin::InPlaceOf(id, holder))
        } else {
            Begin::Refuse
        };
        match self.clients.get_mut(&id) {
            Some(client) if begin != Begin::Refuse => client.answered = true,
            _ => drop(self.clients.remove(&id)),
        }
        begin
    }

    /// The client `id` has gone.
    pub(super) fn end(&mut self, id: Id) {
        self.clients.remove(&id);
    }

    pub(super) fn len(&self) -> usize {
        self.clients.len()
    }

    /// The most that there may be.
    pub(super) fn limit(&self) -> usize {
        self.silent + self.answers
    }

    /// The holder that has most clients.
    pub(super) fn largest(&self, answered: bool) -> Option<Holder> {
        self.by_holder(answered)
            .into_iter()
            .max_by_key(|(_, count)| *count)
            .map(|(holder, _)| holder)
    }

    fn count(&self, answered: bool) -> usize {
        self.clients.values().filter(|client| client.answered == answered).count()
    }

    fn by_holder(&self, answered: bool) -> BTreeMap<Holder, usize> {
        let mut by = BTreeMap::new();
        for client in self.clients.values().filter(|client| client.answered == answered) {
            *by.entry(client.holder).or_default() += 1;
        }
        by
    }

    /// Removes the oldest client of the largest holder; of equally large ones, the oldest of all.
    fn evict(&mut self, answered: bool) -> Option<(Id, Holder)> {
        let by = self.by_holder(answered);
        let largest = by.values().copied().max()?;
        let is_its = |client: &Client| {
            client.answered == answered && by.get(&client.holder) == Some(&largest)
        };
        let (id, holder) = self
            .clients
            .iter()
            .find(|(_, client)| is_its(client))
            .map(|(id, client)| (*id, client.holder))?;
        self.clients.remove(&id);
        Some((id, holder))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ROOT: Holder = Holder::User(0);
    const NOBODY: Holder = Holder::User(65_534);

    #[test]
    fn the_oldest_silent_client_of_the_largest_holder_yields() {
        let mut clients = Clients::new(3, 1);
        let (scraper, _) = clients.accept(ROOT);
        let (first, _) = clients.accept(NOBODY);
        let (second, _) = clients.accept(NOBODY);
        assert_eq!(clients.accept(NOBODY).1, Some((first, NOBODY)));
        assert_eq!(clients.accept(NOBODY).1, Some((second, NOBODY)));
        assert_eq!(clients.begin(scraper), Begin::Answer);
    }

    #[test]
    fn one_holder_gets_two_thirds_of_the_answers_and_is_not_cut_for_another() {
        let mut clients = Clients::new(9, 9);
        let mut ask = |holder| {
            let (id, _) = clients.accept(holder);
            clients.begin(id)
        };
        let greedy = (0..9).map(|_| ask(NOBODY)).filter(|begin| *begin == Begin::Answer).count();
        assert_eq!(greedy, 6);
        assert_eq!(ask(NOBODY), Begin::Refuse);
        assert_eq!((ask(ROOT), ask(ROOT)), (Begin::Answer, Begin::Answer));
    }

    #[test]
    fn where_no_place_is_free_the_oldest_answer_of_the_largest_holder_yields() {
        let mut clients = Clients::new(9, 3);
        let mut ask = |holder| {
            let (id, _) = clients.accept(holder);
            (id, clients.begin(id))
        };
        let (first, _) = ask(NOBODY);
        assert_eq!(ask(NOBODY).1, Begin::Answer);
        assert_eq!(ask(Holder::Local).1, Begin::Answer);
        assert_eq!(ask(Holder::Local).1, Begin::Refuse);
        assert_eq!(ask(ROOT).1, Begin::InPlaceOf(first, NOBODY));
        assert_eq!(ask(ROOT).1, Begin::Refuse, "nobody has two more than it");
    }

    proptest! {
        /// Whatever comes: no more clients than there may be, each accepted, and a holder that has
        /// fewer than the others loses nobody to them.
        #[test]
        fn limits_hold_and_the_smallest_holder_loses_nobody(
            steps in prop::collection::vec((0_u32..4, 0_u8..3), 1..200),
        ) {
            let mut clients = Clients::new(5, 4);
            let mut silent: Vec<(Id, Holder)> = Vec::new();
            for (uid, what) in steps {
                let holder = Holder::User(uid);
                match what {
                    0 | 1 => {
                        let before = clients.by_holder(false);
                        let (id, evicted) = clients.accept(holder);
                        prop_assert!(clients.clients.contains_key(&id), "a new one is always accepted");
                        if let Some((gone, of)) = evicted {
                            let held = |one: Holder| {
                                before.get(&one).copied().unwrap_or(0) + usize::from(one == holder)
                            };
                            prop_assert!(before.keys().all(|other| held(*other) <= held(of)));
                            silent.retain(|(one, _)| *one != gone);
                        }
                        silent.push((id, holder));
                    }
                    _ => {
                        let Some((id, holder)) = silent.pop() else { continue };
                        let before = clients.by_holder(true);
                        let held = before.get(&holder).copied().unwrap_or(0);
                        match clients.begin(id) {
                            Begin::InPlaceOf(_, of) => prop_assert!(before[&of] > held + 1),
                            Begin::Refuse => prop_assert!(
                                held > 0 || before.values().all(|count| *count <= 1)
                            ),
                            Begin::Answer => {}
                        }
                    }
                }
                prop_assert!(clients.count(false) <= 5 && clients.count(true) <= 4);
            }
        }
    }
}
