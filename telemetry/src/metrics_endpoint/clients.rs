//! The clients of the metrics endpoint, and which of them is evicted at a limit. Pure.
//!
//! # Theory of operation
//!
//! ```text
//! accepted ──► silent ──request──► answered ──► closed
//!                │                    │
//!                └──────► evicted ◄───┘
//! ```
//!
//! A client is *silent* until its request is complete. A new client is always accepted: at the
//! limit of silent clients, the oldest silent client of the largest holder is evicted. A *holder*
//! is the owner of a share of the limits: a local user, or an address ([`Holder`]).
//!
//! [`may_take`] decides whether a holder may have one more response. A single greedy holder gets at
//! most two thirds of the responses. The rest stays free for others, without the eviction of
//! responses in progress. If several greedy holders use all responses, a holder with fewer of them
//! evicts the oldest response of the largest holder.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use tidegate_model::may_take;

/// The owner of a share of the limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Holder {
    /// The processes of a local user.
    User(u32),
    /// Local processes of an unknown user.
    Local,
    /// An IPv4 address, or the first address of an IPv6 /64.
    Address(IpAddr),
}

/// For the log, which must not contain client addresses.
impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(uid) => write!(f, "user {uid} of this host"),
            Self::Local => f.write_str("a user of this host"),
            Self::Address(_) => f.write_str("another host"),
        }
    }
}

/// The id of a client. Ids follow the order of acceptance.
pub(super) type Id = u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Client {
    holder: Holder,
    answered: bool,
}

/// The decision about a complete request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begin {
    /// It is served.
    Answer,
    /// It is served, and this client is evicted for it.
    InPlaceOf(Id, Holder),
    /// It is refused at the limit of responses.
    Refuse,
}

/// All clients.
#[derive(Debug)]
pub(super) struct Clients {
    /// The limit of silent clients, at least 1.
    silent: usize,
    /// The limit of concurrent responses, at least 1.
    answers: usize,
    clients: BTreeMap<Id, Client>,
    next: Id,
}

impl Clients {
    pub(super) fn new(silent: usize, answers: usize) -> Self {
        Self { silent: silent.max(1), answers: answers.max(1), clients: BTreeMap::new(), next: 0 }
    }

    /// Accepts a client of `holder`, and evicts a silent one above the limit.
    pub(super) fn accept(&mut self, holder: Holder) -> (Id, Option<(Id, Holder)>) {
        let id = self.next;
        self.next += 1;
        self.clients.insert(id, Client { holder, answered: false });
        let evicted = (self.count(false) > self.silent).then(|| self.evict(false)).flatten();
        (id, evicted)
    }

    /// Decides about the complete request of the silent client `id`.
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

    /// Removes the client `id`.
    pub(super) fn end(&mut self, id: Id) {
        self.clients.remove(&id);
    }

    pub(super) fn len(&self) -> usize {
        self.clients.len()
    }

    /// Returns the maximum number of clients, silent and answered.
    pub(super) fn limit(&self) -> usize {
        self.silent + self.answers
    }

    /// Returns the holder with the most clients.
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

    /// Evicts the oldest client of the largest holder. Among equally large holders, the oldest
    /// client of all is evicted.
    fn evict(&mut self, answered: bool) -> Option<(Id, Holder)> {
        let by = self.by_holder(answered);
        let largest = by.values().copied().max()?;
        let is_candidate = |client: &Client| {
            client.answered == answered && by.get(&client.holder) == Some(&largest)
        };
        let (id, holder) = self
            .clients
            .iter()
            .find(|(_, client)| is_candidate(client))
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
    fn the_oldest_silent_client_of_the_largest_holder_is_evicted() {
        let mut clients = Clients::new(3, 1);
        let (scraper, _) = clients.accept(ROOT);
        let (first, _) = clients.accept(NOBODY);
        let (second, _) = clients.accept(NOBODY);
        assert_eq!(clients.accept(NOBODY).1, Some((first, NOBODY)));
        assert_eq!(clients.accept(NOBODY).1, Some((second, NOBODY)));
        assert_eq!(clients.begin(scraper), Begin::Answer);
    }

    #[test]
    fn one_holder_gets_two_thirds_of_the_responses_and_keeps_them() {
        let mut clients = Clients::new(9, 9);
        let mut request = |holder| {
            let (id, _) = clients.accept(holder);
            clients.begin(id)
        };
        let greedy =
            (0..9).map(|_| request(NOBODY)).filter(|begin| *begin == Begin::Answer).count();
        assert_eq!(greedy, 6);
        assert_eq!(request(NOBODY), Begin::Refuse);
        assert_eq!((request(ROOT), request(ROOT)), (Begin::Answer, Begin::Answer));
    }

    #[test]
    fn without_a_free_response_the_oldest_one_of_the_largest_holder_is_evicted() {
        let mut clients = Clients::new(9, 3);
        let mut request = |holder| {
            let (id, _) = clients.accept(holder);
            (id, clients.begin(id))
        };
        let (first, _) = request(NOBODY);
        assert_eq!(request(NOBODY).1, Begin::Answer);
        assert_eq!(request(Holder::Local).1, Begin::Answer);
        assert_eq!(request(Holder::Local).1, Begin::Refuse);
        assert_eq!(request(ROOT).1, Begin::InPlaceOf(first, NOBODY));
        assert_eq!(request(ROOT).1, Begin::Refuse, "no holder has two more responses");
    }

    proptest! {
        /// The limits hold, every new client is accepted, and a holder with fewer clients than the
        /// others loses none to them.
        #[test]
        fn limits_hold_and_the_smallest_holder_loses_no_client(
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
