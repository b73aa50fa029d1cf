use super::*;

const DEAD: &str = "192.0.2.1:53";
const ALIVE: &str = "192.0.2.2:53";

fn server(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn ms(number: u64) -> Duration {
    Duration::from_millis(number)
}

/// A server of these tests: its address, what it takes to answer the question of the test, and what
/// it takes to answer a check; `None` for never.
type Played = (&'static str, Option<u64>, Option<u64>);

/// Pursues a question among `servers`; who won, and when. Checks go on to their end.
fn run(health: &mut Health, servers: &[Played], start: Instant) -> (Option<SocketAddr>, Duration) {
    let list: Vec<_> = servers.iter().map(|(name, ..)| server(name)).collect();
    let played = |one: SocketAddr| servers.iter().find(|(name, ..)| server(name) == one).unwrap();
    let (mut pursuit, begun) = health.pursue(&list, start);
    let mut checks: Vec<_> = begun.into_iter().map(|check| (check, None)).collect();
    let mut asked: Vec<(SocketAddr, Instant)> = Vec::new();
    let mut now = start;
    let mut won = None;
    for _ in 0..1_000 {
        let mut until = None;
        if won.is_none() {
            until = match pursuit.step(now) {
                Step::Ask(server) => {
                    asked.push((server, now));
                    continue;
                }
                Step::Doubt(server, asked) => {
                    checks.extend(health.doubt(server, asked, now).map(|check| (check, None)));
                    continue;
                }
                Step::GiveUp => {
                    pursuit.silent(now, None).into_iter().for_each(|server| health.missed(server));
                    won = Some((None, now - start));
                    continue;
                }
                Step::Wait(until) => Some(until),
            };
            let answers =
                asked.iter().filter_map(|(one, at)| Some((*at + ms(played(*one).1?), *one)));
            if let Some((at, winner)) = answers.min() {
                if at <= now {
                    let sent = asked.iter().find(|(one, _)| *one == winner).unwrap().1;
                    health.took(winner, at - sent, at);
                    health.heard(winner, at);
                    pursuit.heard(winner);
                    let silent = pursuit.silent(at, Some(winner));
                    silent.into_iter().for_each(|server| health.missed(server));
                    won = Some((Some(winner), at - start));
                    continue;
                }
                until = until.map(|until| until.min(at));
            }
        }
        checks.retain_mut(|(check, heard)| {
            loop {
                if heard.is_some_and(|heard| heard <= now) {
                    health.heard(check.server, now);
                    health.checked(check.server);
                    return false;
                }
                match check.step(now) {
                    CheckStep::Ask => {
                        let takes = played(check.server).2.map(|takes| now + ms(takes));
                        *heard = heard.or(takes);
                    }
                    CheckStep::Strike => drop(health.strike(check, now)),
                    CheckStep::End => {
                        health.checked(check.server);
                        return false;
                    }
                    CheckStep::Wait(at) => {
                        let at = heard.map_or(at, |heard| at.min(heard));
                        until = Some(until.map_or(at, |until| until.min(at)));
                        return true;
                    }
                }
            }
        });
        match (until, won) {
            (None, Some(won)) => return won,
            (until, _) => now = until.unwrap(),
        }
    }
    panic!("it does not end");
}

/// Whether others are asked before `one`.
fn is_suspect(health: &Health, one: &str) -> bool {
    health.figures().any(|(address, trusted, _)| address == server(one) && !trusted)
}

/// Issue threads of libnetwork and moby ask for this above all: a dead first server costs once.
#[test]
fn a_dead_first_server_costs_one_question_its_patience_and_others_nothing() {
    let mut health = Health::new(8);
    let servers = [(DEAD, None, None), (ALIVE, Some(10), Some(1))];
    let start = Instant::now();
    let (winner, took) = run(&mut health, &servers, start);
    assert_eq!((winner, took), (Some(server(ALIVE)), PATIENCE + ms(10)));
    for later in [1_000, 4_000, 6_000, 20_000, 90_000] {
        let (winner, took) = run(&mut health, &servers, start + ms(later));
        assert_eq!((winner, took), (Some(server(ALIVE)), ms(10)), "after {later} ms");
    }
}

#[test]
fn a_dead_server_is_suspect_before_the_next_one_can_have_answered() {
    let mut health = Health::new(8);
    let start = Instant::now();
    let mut check = health.doubt(server(DEAD), start, start + DOUBT).unwrap();
    let mut now = start + DOUBT;
    while !is_suspect(&health, DEAD) {
        match check.step(now) {
            CheckStep::Strike => drop(health.strike(&check, now)),
            CheckStep::Wait(until) => now = until,
            CheckStep::Ask => {}
            CheckStep::End => panic!("never suspect"),
        }
    }
    assert!(now < start + PATIENCE, "{:?}", now - start);
}

/// An asker can have any name served by authoritative servers that are slow, silent or failing.
#[test]
fn a_question_that_stays_unanswered_makes_no_live_server_suspect() {
    let mut health = Health::new(8);
    let start = Instant::now();
    let servers = [(DEAD, None, Some(20)), (ALIVE, Some(1), Some(1))];
    for number in 0..50 {
        let (winner, _) = run(&mut health, &servers, start + ms(number * 10_000));
        assert_eq!(winner, Some(server(ALIVE)));
        assert!(!is_suspect(&health, DEAD), "after {number} questions");
        let (pursuit, checks) = health.pursue(&[server(DEAD), server(ALIVE)], start);
        assert_eq!(pursuit.candidates[0].server, server(DEAD));
        assert!(checks.is_empty());
    }
}

#[test]
fn a_server_that_is_started_late_is_trusted_as_soon_as_it_answers() {
    let mut health = Health::new(8);
    let start = Instant::now();
    let mut check = health.doubt(server(DEAD), start, start).unwrap();
    assert_eq!(check.step(start), CheckStep::Ask);
    assert!(check.refused() && health.strike(&check, start));
    assert!(!check.refused(), "one strike for each check");
    let mut now = start;
    while check.step(now) != CheckStep::Ask {
        now += ms(1);
    }
    assert!(now < start + SUSPECT);
    assert!(!matches!(check.step(now + CHECK_TIME), CheckStep::Ask), "once more, and not for ever");
    assert!(health.heard(server(DEAD), now));
    assert!(!is_suspect(&health, DEAD));
}

#[test]
fn a_server_that_answers_anybody_is_not_even_checked() {
    let mut health = Health::new(8);
    let start = Instant::now();
    health.heard(server(ALIVE), start + ms(10));
    assert!(health.doubt(server(ALIVE), start, start + DOUBT).is_none());
    let check = health.doubt(server(ALIVE), start + ms(20), start + ms(80)).unwrap();
    assert!(health.doubt(server(ALIVE), start + ms(20), start + ms(90)).is_none(), "one at a time");
    health.heard(server(ALIVE), start + ms(100));
    assert!(!health.strike(&check, start + ms(230)), "it has answered another question");
    assert!(!is_suspect(&health, ALIVE));
}

#[test]
fn a_long_way_to_a_server_is_taken_into_account() {
    let mut health = Health::new(8);
    let start = Instant::now();
    let far = [(DEAD, Some(600), Some(600)), (ALIVE, Some(1), Some(1))];
    health.took(server(DEAD), ms(600), start);
    run(&mut health, &far, start);
    assert!(!is_suspect(&health, DEAD));
    // Without that knowledge it is suspect for the rest of its round trip.
    let mut health = Health::new(8);
    run(&mut health, &far, start);
    assert!(!is_suspect(&health, DEAD), "its answer has come");
}

#[test]
fn a_server_that_is_back_is_noticed_and_first_again() {
    let mut health = Health::new(8);
    let start = Instant::now();
    run(&mut health, &[(DEAD, None, None), (ALIVE, Some(10), Some(10))], start);
    let back = [(DEAD, Some(1), Some(1)), (ALIVE, Some(10), Some(10))];
    let (winner, _) = run(&mut health, &back, start + ms(4_000));
    assert_eq!(winner, Some(server(ALIVE)), "not yet");
    // It is checked beside this question, which goes to the other one.
    let (winner, took) = run(&mut health, &back, start + ms(6_000));
    assert_eq!((winner, took), (Some(server(ALIVE)), ms(10)));
    let (mut pursuit, checks) = health.pursue(&[server(DEAD), server(ALIVE)], start + ms(7_000));
    assert_eq!(pursuit.step(start + ms(7_000)), Step::Ask(server(DEAD)));
    assert!(checks.is_empty());
}

#[test]
fn one_check_at_a_time_looks_after_a_suspect() {
    let mut health = Health::new(8);
    let start = Instant::now();
    run(&mut health, &[(DEAD, None, None), (ALIVE, Some(10), Some(10))], start);
    let list = [server(DEAD), server(ALIVE)];
    let later = start + ms(6_000);
    let (mut first, checks) = health.pursue(&list, later);
    assert_eq!(checks.len(), 1);
    let (mut second, checks) = health.pursue(&list, later);
    assert!(checks.is_empty());
    for pursuit in [&mut first, &mut second] {
        assert_eq!(pursuit.step(later), Step::Ask(server(ALIVE)));
    }
}

#[test]
fn slow_servers_are_waited_for_and_not_blamed() {
    let mut health = Health::new(8);
    let start = Instant::now();
    let slow = (ALIVE, Some(2_000), Some(5));
    assert_eq!(run(&mut health, &[slow], start), (Some(server(ALIVE)), ms(2_000)));
    run(&mut health, &[(DEAD, Some(2_000), Some(5)), slow], start);
    assert!(health.figures().all(|(_, trusted, figures)| trusted && figures.missed == 0));
}

/// One that followed what questions take would let an asker change it for others.
#[test]
fn the_patience_does_not_depend_on_what_others_have_asked() {
    let mut health = Health::new(8);
    let start = Instant::now();
    for number in 0..1_000 {
        health.took(server(DEAD), Duration::from_micros(50), start + ms(number));
        health.heard(server(DEAD), start + ms(number));
    }
    let servers = [(DEAD, Some(190), Some(1)), (ALIVE, Some(1), Some(1))];
    let took = run(&mut health, &servers, start + ms(2_000));
    assert_eq!(took, (Some(server(DEAD)), ms(190)));
}

#[test]
fn a_failure_brings_the_next_one_on_at_once() {
    let mut health = Health::new(8);
    let now = Instant::now();
    let (mut pursuit, _) = health.pursue(&[server(DEAD), server(ALIVE)], now);
    assert_eq!(pursuit.step(now), Step::Ask(server(DEAD)));
    pursuit.failed(server(DEAD), now + ms(1));
    assert_eq!(pursuit.step(now + ms(1)), Step::Ask(server(ALIVE)));
    pursuit.failed(server(ALIVE), now + ms(2));
    assert_eq!(pursuit.step(now + ms(2)), Step::GiveUp);
}

#[test]
fn nobody_is_asked_for_ever() {
    let mut health = Health::new(8);
    let now = Instant::now();
    let nobody = [(DEAD, None, None), (ALIVE, None, None)];
    assert_eq!(run(&mut health, &nobody, now), (None, DEADLINE));
    assert_eq!(run(&mut health, &nobody, now + ms(30_000)), (None, DEADLINE));
    assert_eq!(
        run(&mut health, &nobody, now + ms(90_000)),
        (None, DEADLINE_OF_SILENT),
        "they have been silent twice"
    );
    assert_eq!(run(&mut health, &[], now), (None, Duration::ZERO));
}

#[test]
fn one_server_is_asked_again_for_datagrams_are_lost() {
    let mut health = Health::new(8);
    let start = Instant::now();
    let (mut pursuit, _) = health.pursue(&[server(ALIVE)], start);
    let mut asked = Vec::new();
    let mut now = start;
    loop {
        match pursuit.step(now) {
            Step::Ask(_) => asked.push((now - start).as_millis()),
            Step::Doubt(..) => {}
            Step::Wait(until) => now = until,
            Step::GiveUp => break,
        }
    }
    assert_eq!(asked, [0, 1_000, 3_000]);
}

/// RFC 6891 section 7: a server may answer FORMERR to what it does not understand.
#[test]
fn a_server_without_edns_is_asked_without_for_an_hour() {
    let mut health = Health::new(8);
    let now = Instant::now();
    assert!(health.form(server(ALIVE), now).edns);
    health.plain(server(ALIVE), now);
    assert!(!health.form(server(ALIVE), now + ms(1)).edns);
    assert!(health.form(server(ALIVE), now + ABILITY_LIFE).edns);
}

/// Some answer FORMERR or NOTIMP to types that they do not like, and an asker chooses the type.
#[test]
fn a_server_that_has_used_edns_keeps_it_whatever_it_refuses() {
    let mut health = Health::new(8);
    let now = Instant::now();
    health.speaks_edns(server(ALIVE), now);
    health.plain(server(ALIVE), now + ms(1));
    assert!(health.form(server(ALIVE), now + ms(2)).edns);
}

#[test]
fn a_server_that_changes_the_case_over_tcp_too_is_asked_in_lower_case() {
    let mut health = Health::new(8);
    let now = Instant::now();
    assert!(health.form(server(ALIVE), now).mixed);
    health.changed_case(server(ALIVE), Some(false), now);
    assert!(health.form(server(ALIVE), now).mixed, "what came over UDP was forged");
    health.changed_case(server(ALIVE), Some(true), now);
    assert!(!health.form(server(ALIVE), now).mixed);
    assert!(health.form(server(ALIVE), now + ABILITY_LIFE).mixed);
}

/// One forged answer with the right port and ID must not turn the protection off.
#[test]
fn without_tcp_several_questions_have_to_agree_that_a_server_changes_the_case() {
    let mut health = Health::new(8);
    let now = Instant::now();
    for _ in 1..CHANGES {
        health.changed_case(server(ALIVE), None, now);
        assert!(health.form(server(ALIVE), now).mixed);
    }
    health.changed_case(server(ALIVE), None, now);
    assert!(!health.form(server(ALIVE), now).mixed);
    // One that has kept the case is never taken for one that changes it.
    let mut health = Health::new(8);
    health.keeps_case(server(ALIVE), now);
    for _ in 0..100 {
        health.changed_case(server(ALIVE), None, now);
    }
    assert!(health.form(server(ALIVE), now).mixed);
}

#[test]
fn no_more_servers_are_remembered_than_may_be() {
    let mut health = Health::new(2);
    for number in 1..=5_u8 {
        health.asks((std::net::Ipv4Addr::new(192, 0, 2, number), 53).into());
    }
    let known: Vec<_> = health.figures().map(|(server, ..)| server.ip().to_string()).collect();
    assert_eq!(known, ["192.0.2.4", "192.0.2.5"]);
}

#[test]
fn where_nobody_is_they_are_asked_anew_for_a_moment() {
    let mut health = Health::new(8);
    let start = Instant::now();
    let mut now = start;
    let mut asked = Vec::new();
    let (mut pursuit, _) = health.pursue(&[server(ALIVE)], start);
    loop {
        match pursuit.step(now) {
            Step::Ask(server) => {
                asked.push((now - start).as_millis());
                pursuit.gone(server, now);
            }
            Step::Doubt(..) => panic!("it is known to be gone"),
            Step::Wait(until) => now = until,
            Step::GiveUp => break,
        }
    }
    assert_eq!(asked, [0, 100, 300, 700]);
    let check = health.doubt(server(ALIVE), start, start).unwrap();
    health.strike(&check, start);
    health.strike(&check, start + ms(60_000));
    let later = start + ms(61_000);
    let (mut pursuit, _) = health.pursue(&[server(ALIVE)], later);
    assert_eq!(pursuit.step(later), Step::Ask(server(ALIVE)));
    pursuit.gone(server(ALIVE), later);
    assert_eq!(pursuit.step(later), Step::GiveUp, "there is nobody for good");
}
