//! Who holds how many TCP connections at which port, and how many bytes for peers that do not
//! drain, and who yields at a limit. Pure, but for the lock around it: all loops share one book.
//!
//! # Theory of operation
//!
//! Connections are limited in all, for each port, and by descriptors. A *client*, an IPv4 address
//! or an IPv6 /64, may take one connection more as long as [`may_take`] says so of what is free, in
//! all and at the port: one greedy client gets two thirds of each, without a running connection
//! being cut for anybody else. A port that is not the only one gets four fifths of all, so that a
//! client with its share leaves room at its port.
//!
//! Where a client may take no more, and another one has more than twice as much, that one yields:
//! of its connections the one that has carried nothing for longest is cut. Otherwise the newcomer
//! is refused; if it is only descriptors that are short, and it holds next to nothing, it waits for
//! the next one.
//!
//! Bytes have one budget. A half may become wide as long as [`may_take`] says so of what is left of
//! it ([`Book::take_bytes`]). What a narrow half holds while it is blocked is charged in any case
//! ([`Book::charge_bytes`]): if that exceeds the budget, the client that holds most bytes has to
//! yield ([`Book::over_budget`]).

use crate::port::Refusal;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tidegate_model::{Ranking, may_take};
use tidegate_reactor::Permit;

/// Whose connections at which port ([`Port::id`](crate::port::Port::id)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Holder {
    pub(crate) client: IpAddr,
    pub(crate) port: u64,
}

/// What becomes of a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// There is room, and it is counted.
    Room,
    /// A limit is reached.
    Refused(Refusal),
    /// Loop `at` has connections of `holder`, one of which has to end first, for this limit.
    InPlaceOf { holder: Holder, at: usize, limit: Refusal },
    /// No descriptor is free, and nobody has more connections than the newcomer.
    Wait,
}

/// The limits of a new connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    /// Connections that the port may have.
    pub(crate) port_limit: usize,
    /// Connections for which there are descriptors left.
    pub(crate) descriptors: usize,
    /// Whether others are published beside the port.
    pub(crate) among_others: bool,
}

/// The limits of all ports together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) connections: usize,
    /// Connections of one client, if that is limited to less than its share.
    pub(crate) of_client: Option<usize>,
    /// Bytes held for peers that do not drain.
    pub(crate) bytes: usize,
}

/// How much is taken, and who has most.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// The client that has most connections, and how many, if they are more than one.
    pub(crate) largest: Option<(IpAddr, usize)>,
    /// Connections of the client that has most.
    pub(crate) most: usize,
    /// Bytes held for peers that do not drain.
    pub(crate) bytes: usize,
    /// The client that holds most bytes, and how many.
    pub(crate) largest_of_bytes: Option<(IpAddr, usize)>,
}

/// The book of all loops.
#[derive(Debug)]
pub(crate) struct Shares(Mutex<Book>);

impl Shares {
    pub(crate) fn new(limits: Limits) -> Self {
        Self(Mutex::new(Book::new(limits)))
    }

    /// [`Book::admit`]; the guard of the lock is never handed out, so that nobody holds it twice.
    pub(crate) fn admit(&self, holder: Holder, at: usize, room: Room) -> Verdict {
        self.book().admit(holder, at, room)
    }

    /// [`Book::add`].
    pub(crate) fn add(&self, holder: Holder, at: usize) {
        self.book().add(holder, at);
    }

    /// [`Book::end`].
    pub(crate) fn end(&self, holder: Holder, at: usize) {
        self.book().end(holder, at);
    }

    /// [`Book::over_budget`].
    pub(crate) fn over_budget(&self) -> Option<(Holder, usize)> {
        self.book().over_budget()
    }

    /// How much of what is there is taken.
    pub(crate) fn usage(&self) -> Usage {
        self.book().usage()
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        // A panic between two of its statements leaves figures that are off by one.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place in the book, and its descriptors; both are given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    shares: Arc<Shares>,
    holder: Holder,
    at: usize,
    /// Its bytes of the budget.
    bytes: usize,
    _permit: Permit,
}

impl Seat {
    /// The place of a connection of `holder` in loop `at`, which is in the book already.
    pub(crate) fn new(shares: Arc<Shares>, holder: Holder, at: usize, permit: Permit) -> Self {
        Self { shares, holder, at, bytes: 0, _permit: permit }
    }

    pub(crate) fn holder(&self) -> Holder {
        self.holder
    }

    /// Takes `more` bytes of the budget, if they are left for its client.
    pub(crate) fn take(&mut self, more: usize) -> bool {
        let taken = self.shares.book().take_bytes(self.holder, self.at, more);
        self.bytes += if taken { more } else { 0 };
        taken
    }

    /// Has `now` bytes of the budget where it had `before`.
    pub(crate) fn charge(&mut self, before: usize, now: usize) {
        if before != now {
            self.shares.book().charge_bytes(self.holder, self.at, before, now);
            self.bytes = self.bytes + now - before;
        }
    }

    /// The connection is to be another loop's. It holds no bytes yet.
    pub(crate) fn hand_over(&mut self, to: usize) {
        if to != self.at {
            self.shares.book().hand_over(self.holder, self.at, to);
            self.at = to;
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut book = self.shares.book();
        book.charge_bytes(self.holder, self.at, self.bytes, 0);
        book.end(self.holder, self.at);
    }
}

/// How much each client holds of something, connections or bytes.
#[derive(Debug, Default)]
struct Holdings {
    held: usize,
    clients: HashMap<IpAddr, usize>,
    ranking: Ranking<IpAddr>,
}

impl Holdings {
    fn of(&self, client: IpAddr) -> usize {
        self.clients.get(&client).copied().unwrap_or(0)
    }

    /// A part of what `client` holds is `now`, and was `before`.
    fn change(&mut self, client: IpAddr, before: usize, now: usize) {
        self.held = self.held + now - before;
        let of_client = self.clients.entry(client).or_default();
        let old = std::mem::replace(of_client, *of_client + now - before);
        self.ranking.change(client, old, *of_client);
        if *of_client == 0 {
            self.clients.remove(&client);
        }
    }
}

/// The same, and in which loop each holder has how much.
#[derive(Debug, Default)]
struct Located {
    all: Holdings,
    loops: BTreeMap<(Holder, usize), usize>,
}

impl Located {
    fn change(&mut self, holder: Holder, at: usize, before: usize, now: usize) {
        if before != now {
            self.all.change(holder.client, before, now);
            self.change_in_loop(holder, at, before, now);
        }
    }

    fn change_in_loop(&mut self, holder: Holder, at: usize, before: usize, now: usize) {
        let in_loop = self.loops.entry((holder, at)).or_default();
        *in_loop = *in_loop + now - before;
        if *in_loop == 0 {
            self.loops.remove(&(holder, at));
        }
    }

    /// The port and the loop in which `client` has most.
    fn mainstay(&self, client: IpAddr) -> Option<(Holder, usize)> {
        let of_client = self.loops.range((Holder { client, port: 0 }, 0)..);
        let of_client = of_client.take_while(|((holder, _), _)| holder.client == client);
        of_client.max_by_key(|(_, held)| **held).map(|(key, _)| *key)
    }
}

#[derive(Debug)]
struct Book {
    limits: Limits,
    connections: Located,
    /// Connections of each port.
    ports: HashMap<u64, Holdings>,
    /// Bytes held for peers that do not drain.
    bytes: Located,
}

impl Book {
    fn new(limits: Limits) -> Self {
        Self {
            limits,
            connections: Located::default(),
            ports: HashMap::new(),
            bytes: Located::default(),
        }
    }

    /// Judges a new connection of `holder` that loop `at` has accepted, and counts it if there is
    /// room.
    fn admit(&mut self, holder: Holder, at: usize, room: Room) -> Verdict {
        let verdict = self.judge(holder, at, room);
        if verdict == Verdict::Room {
            self.add(holder, at);
        }
        verdict
    }

    fn judge(&self, holder: Holder, at: usize, room: Room) -> Verdict {
        let all = &self.connections.all;
        let client_held = all.of(holder.client);
        let port = self.ports.get(&holder.port);
        let port_held = port.map_or(0, |port| port.held);
        let held_there = port.map_or(0, |port| port.of(holder.client));
        let within_limit = self.limits.connections.saturating_sub(all.held);
        let free = within_limit.min(room.descriptors);
        let port_free = room.port_limit.saturating_sub(port_held);

        let yields = |of: &Holdings, held: usize| {
            let largest = of.ranking.largest();
            largest.filter(|(_, most)| *most > 2 * held + 1).map(|(client, _)| client)
        };
        let largest_there = || {
            let client = yields(port?, held_there)?;
            Some(Holder { client, ..holder })
        };
        let largest = || Some(self.connections.mainstay(yields(all, client_held)?)?.0);

        if self.limits.of_client.is_some_and(|limit| client_held >= limit) {
            return Verdict::Refused(Refusal::ClientLimit);
        }
        let (limit, victim, otherwise) = if free == 0 {
            let otherwise = match (within_limit, client_held) {
                (0, _) => Verdict::Refused(Refusal::TotalLimit),
                (_, 0 | 1) => Verdict::Wait,
                _ => Verdict::Refused(Refusal::ClientLimit),
            };
            (Refusal::TotalLimit, largest(), otherwise)
        } else if !may_take(client_held, free) {
            (Refusal::TotalLimit, largest(), Verdict::Refused(Refusal::ClientLimit))
        } else if port_free > 0 && !may_take(held_there, port_free) {
            (Refusal::PortLimit, largest_there(), Verdict::Refused(Refusal::ClientLimit))
        } else if port_free == 0 || room.among_others && !may_take(port_held / 2, free) {
            (Refusal::PortLimit, largest_there(), Verdict::Refused(Refusal::PortLimit))
        } else {
            return Verdict::Room;
        };
        victim.and_then(|victim| self.instead_of(victim, at, limit)).unwrap_or(otherwise)
    }

    /// To end a connection of `holder`, in this loop if it has one, which is `at`.
    fn instead_of(&self, holder: Holder, at: usize, limit: Refusal) -> Option<Verdict> {
        let loops = &self.connections.loops;
        let here = loops.contains_key(&(holder, at)).then_some(at);
        let elsewhere =
            || loops.range((holder, 0)..).next().filter(|((other, _), _)| *other == holder);
        let at = here.or_else(|| elsewhere().map(|((_, at), _)| *at))?;
        Some(Verdict::InPlaceOf { holder, at, limit })
    }

    /// Counts a connection without judging it: another one has ended for it.
    fn add(&mut self, holder: Holder, at: usize) {
        self.connections.change(holder, at, 0, 1);
        self.ports.entry(holder.port).or_default().change(holder.client, 0, 1);
    }

    /// A connection of `holder` in loop `at` has ended.
    fn end(&mut self, holder: Holder, at: usize) {
        if !self.connections.loops.contains_key(&(holder, at)) {
            return;
        }
        self.connections.change(holder, at, 1, 0);
        if let Entry::Occupied(mut port) = self.ports.entry(holder.port) {
            port.get_mut().change(holder.client, 1, 0);
            if port.get().held == 0 {
                port.remove();
            }
        }
    }

    /// A connection of `holder` goes from one loop to another.
    fn hand_over(&mut self, holder: Holder, from: usize, to: usize) {
        if self.connections.loops.contains_key(&(holder, from)) {
            self.connections.change_in_loop(holder, from, 1, 0);
            self.connections.change_in_loop(holder, to, 0, 1);
        }
    }

    /// Takes `more` bytes for a connection of `holder` in loop `at`, if they are left for its
    /// client.
    fn take_bytes(&mut self, holder: Holder, at: usize, more: usize) -> bool {
        let free = self.limits.bytes.saturating_sub(self.bytes.all.held);
        let may = more <= free && may_take(self.bytes.all.of(holder.client), free);
        if may {
            self.charge_bytes(holder, at, 0, more);
        }
        may
    }

    /// A connection of `holder` in loop `at` holds `now` bytes, and held `before`.
    fn charge_bytes(&mut self, holder: Holder, at: usize, before: usize, now: usize) {
        self.bytes.change(holder, at, before, now);
    }

    /// Where more bytes are held than the budget has: of whose connections one has to end, and in
    /// which loop.
    fn over_budget(&self) -> Option<(Holder, usize)> {
        let Holdings { held, ranking, .. } = &self.bytes.all;
        let (client, _) = ranking.largest().filter(|_| *held > self.limits.bytes)?;
        self.bytes.mainstay(client)
    }

    fn usage(&self) -> Usage {
        let (all, bytes) = (&self.connections.all, &self.bytes.all);
        let largest = all.ranking.largest();
        Usage {
            largest,
            most: largest.map_or(usize::from(all.held > 0), |(_, held)| held),
            bytes: bytes.held,
            largest_of_bytes: bytes.ranking.largest(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn holder(client: u8, port: u64) -> Holder {
        Holder { client: [192, 0, 2, client].into(), port }
    }

    fn book(connections: usize) -> Book {
        Book::new(Limits { connections, of_client: None, bytes: 1000 })
    }

    const ROOM: Room = Room { port_limit: 1000, descriptors: 1000, among_others: true };

    /// How many connections `holder` gets of those that it asks for.
    fn got(book: &mut Book, holder: Holder, asked: usize, room: Room) -> usize {
        (0..asked).filter(|_| book.admit(holder, 0, room) == Verdict::Room).count()
    }

    #[test]
    fn one_client_gets_two_thirds_and_others_are_served_at_the_same_port_and_at_another() {
        let mut book = book(9);
        assert_eq!(got(&mut book, holder(1, 1), 9, ROOM), 6);
        assert_eq!(book.admit(holder(1, 2), 0, ROOM), Verdict::Refused(Refusal::ClientLimit));
        let alone = Room { among_others: false, ..ROOM };
        assert_eq!(got(&mut book, holder(2, 1), 1, alone), 1);
        assert_eq!(got(&mut book, holder(3, 2), 1, ROOM), 1);
    }

    #[test]
    fn one_client_gets_two_thirds_of_a_ports_limit() {
        let mut book = book(1000);
        let room = Room { port_limit: 3, ..ROOM };
        assert_eq!(got(&mut book, holder(1, 1), 3, room), 2);
        assert_eq!(got(&mut book, holder(2, 1), 3, room), 1);
        let yields = Verdict::InPlaceOf { holder: holder(1, 1), at: 0, limit: Refusal::PortLimit };
        assert_eq!(book.admit(holder(3, 1), 0, room), yields);
        book.end(holder(1, 1), 0);
        assert_eq!(book.admit(holder(3, 1), 0, room), Verdict::Room);
        assert_eq!(
            book.admit(holder(4, 1), 0, room),
            Verdict::Refused(Refusal::PortLimit),
            "all are equal"
        );
    }

    #[test]
    fn many_clients_of_one_port_leave_a_fifth_to_other_ports() {
        let mut book = book(10);
        let clients = (1..=10).map(|client| got(&mut book, holder(client, 1), 1, ROOM));
        assert_eq!(clients.sum::<usize>(), 8);
        assert_eq!(got(&mut book, holder(1, 2), 1, ROOM), 1);
        let alone = Room { among_others: false, ..ROOM };
        assert_eq!(got(&mut book, holder(9, 1), 1, alone), 1);
    }

    #[test]
    fn where_descriptors_run_out_the_largest_yields_and_equals_wait() {
        let mut book = book(1000);
        got(&mut book, holder(1, 1), 2, ROOM);
        got(&mut book, holder(1, 2), 3, ROOM);
        assert_eq!(book.connections.all.ranking.largest(), Some((holder(1, 1).client, 5)));
        let short = Room { descriptors: 0, ..ROOM };
        let yields = Verdict::InPlaceOf { holder: holder(1, 2), at: 0, limit: Refusal::TotalLimit };
        assert_eq!(book.admit(holder(2, 1), 1, short), yields);
        assert_eq!(book.admit(holder(1, 1), 0, short), Verdict::Refused(Refusal::ClientLimit));
        for _ in 0..3 {
            book.end(holder(1, 2), 0);
        }
        book.end(holder(1, 1), 0);
        assert_eq!(book.admit(holder(2, 1), 0, short), Verdict::Wait);
    }

    #[test]
    fn a_client_may_be_limited_to_less_than_its_share() {
        let mut book = Book::new(Limits { connections: 100, of_client: Some(2), bytes: 1000 });
        assert_eq!(got(&mut book, holder(1, 1), 5, ROOM), 2);
    }

    #[test]
    fn a_connection_that_is_handed_over_is_found_in_its_loop() {
        let mut book = book(3);
        got(&mut book, holder(1, 1), 2, ROOM);
        book.hand_over(holder(1, 1), 0, 3);
        got(&mut book, holder(2, 1), 1, Room { among_others: false, ..ROOM });
        let at = |verdict| match verdict {
            Verdict::InPlaceOf { at, .. } => Some(at),
            _ => None,
        };
        assert_eq!(at(book.admit(holder(3, 1), 0, ROOM)), Some(0));
        assert_eq!(at(book.admit(holder(3, 1), 3, ROOM)), Some(3));
    }

    #[test]
    fn a_client_may_take_two_thirds_of_the_bytes_and_the_largest_yields_when_there_are_too_many() {
        let mut book = book(9);
        let greedy = holder(1, 1);
        let taken = (0..20).filter(|_| book.take_bytes(greedy, 1, 100)).count();
        assert_eq!(taken, 7, "600 of 1000 are fewer than twice 400");
        assert!(book.take_bytes(holder(2, 1), 0, 100));
        book.charge_bytes(holder(2, 2), 0, 0, 200);
        assert_eq!(book.over_budget(), None, "1000 are held");
        book.charge_bytes(greedy, 0, 0, 1);
        assert_eq!(book.over_budget(), Some((greedy, 1)));
        book.charge_bytes(greedy, 1, 700, 0);
        assert_eq!((book.over_budget(), book.bytes.all.held), (None, 301));
        book.charge_bytes(greedy, 0, 1, 0);
        assert_eq!(book.bytes.all.ranking.largest(), Some((holder(2, 1).client, 300)));
    }

    proptest! {
        /// Whatever comes, no limit is exceeded, and who has one connection at most loses none.
        #[test]
        fn limits_hold_and_the_small_lose_nothing(
            steps in prop::collection::vec((0_u8..5, 0_u64..3, 0_usize..2, any::<bool>()), 0..200),
        ) {
            let mut book = book(12);
            let mut held: Vec<(Holder, usize)> = Vec::new();
            for (client, port, at, ends) in steps {
                let holder = holder(client, port);
                if ends {
                    if let Some(index) = held.iter().position(|held| *held == (holder, at)) {
                        held.swap_remove(index);
                        book.end(holder, at);
                    }
                    continue;
                }
                let room = Room { port_limit: 6, descriptors: 10 - held.len().min(10), among_others: true };
                match book.admit(holder, at, room) {
                    Verdict::Room => held.push((holder, at)),
                    Verdict::InPlaceOf { holder: victim, at, .. } => {
                        let of = |client| held.iter().filter(|(held, _)| held.client == client).count();
                        prop_assert!(of(victim.client) > 1);
                        let index = held.iter().position(|held| *held == (victim, at));
                        prop_assert!(index.is_some());
                        held.swap_remove(index.unwrap());
                        book.end(victim, at);
                    }
                    Verdict::Refused(_) | Verdict::Wait => {}
                }
                prop_assert!(held.len() <= 10);
                prop_assert_eq!(book.connections.all.held, held.len());
                for port in 0..3 {
                    prop_assert!(held.iter().filter(|(held, _)| held.port == port).count() <= 6);
                }
            }
            for (holder, at) in held {
                book.end(holder, at);
            }
            prop_assert!(book.connections.all.clients.is_empty() && book.ports.is_empty());
            prop_assert!(book.connections.loops.is_empty());
            prop_assert_eq!(book.connections.all.ranking.largest(), None);
        }
    }
}
