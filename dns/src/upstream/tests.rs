use super::*;

const DEAD: &str = "192.0.2.1:53";
const ALIVE: &str = "192.0.2.2:53";

fn server(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn ms(number: u64) -> Duration {
    Duration::from_millis(number)
}

/// A simulated server: address, response time to the query of the test and to a check in ms; `None`
/// for no response.
type SimulatedServer = (&'static str, Option<u64>, Option<u64>);

/// Runs the failover of a query over `servers`, and all checks to their end. Returns the first
/// server that responded, and when.
fn run(
    health: &mut Health,
    servers: &[SimulatedServer],
    start: Instant,
) -> (Option<SocketAddr>, Duration) {
    let list: Vec<_> = servers.iter().map(|(name, ..)| server(name)).collect();
    let simulated =
        |one: SocketAddr| servers.iter().find(|(name, ..)| server(name) == one).unwrap();
    let (mut failover, begun) = health.begin_failover(&list, start);
    let mut checks: Vec<_> = begun.into_iter().map(|check| (check, None)).collect();
    let mut asked: Vec<(SocketAddr, Instant)> = Vec::new();
    let mut now = start;
    let mut won = None;
    for _ in 0..1_000 {
        let mut until = None;
        if won.is_none() {
            until = match failover.step(now) {
                Step::Ask(server) => {
                    asked.push((server, now));
                    continue;
                }
                Step::Silent(server, asked) => {
                    checks
                        .extend(health.check_silent(server, asked, now).map(|check| (check, None)));
                    continue;
                }
                Step::GiveUp => {
                    failover.silent(now, None).into_iter().for_each(|server| health.missed(server));
                    won = Some((None, now - start));
                    continue;
                }
                Step::Wait(until) => Some(until),
            };
            let answers =
                asked.iter().filter_map(|(one, at)| Some((*at + ms(simulated(*one).1?), *one)));
            if let Some((at, winner)) = answers.min() {
                if at <= now {
                    let sent = asked.iter().find(|(one, _)| *one == winner).unwrap().1;
                    health.note_response_time(winner, at - sent, at);
                    health.responded(winner, at);
                    failover.responded(winner);
                    let silent = failover.silent(at, Some(winner));
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
                    health.responded(check.server, now);
                    health.check_ended(check.server);
                    return false;
                }
                match check.step(now) {
                    CheckStep::Ask => {
                        let takes = simulated(check.server).2.map(|takes| now + ms(takes));
                        *heard = heard.or(takes);
                    }
                    CheckStep::Fail => drop(health.check_failed(check, now)),
                    CheckStep::End => {
                        health.check_ended(check.server);
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
    panic!("the simulation does not end");
}

/// Whether `one` is suspect.
fn is_suspect(health: &Health, one: &str) -> bool {
    health.figures().any(|(address, trusted, _)| address == server(one) && !trusted)
}

/// The most frequent request in issues of libnetwork and moby.
#[test]
fn a_dead_first_server_delays_one_query_by_the_failover_delay() {
    let mut health = Health::new(8);
    let servers = [(DEAD, None, None), (ALIVE, Some(10), Some(1))];
    let start = Instant::now();
    let (winner, took) = run(&mut health, &servers, start);
    assert_eq!((winner, took), (Some(server(ALIVE)), FAILOVER_DELAY + ms(10)));
    for later in [1_000, 4_000, 6_000, 20_000, 90_000] {
        let (winner, took) = run(&mut health, &servers, start + ms(later));
        assert_eq!((winner, took), (Some(server(ALIVE)), ms(10)), "after {later} ms");
    }
}

#[test]
fn a_dead_server_is_suspect_within_the_failover_delay() {
    let mut health = Health::new(8);
    let start = Instant::now();
    let mut check = health.check_silent(server(DEAD), start, start + CHECK_DELAY).unwrap();
    let mut now = start + CHECK_DELAY;
    while !is_suspect(&health, DEAD) {
        match check.step(now) {
            CheckStep::Fail => drop(health.check_failed(&check, now)),
            CheckStep::Wait(until) => now = until,
            CheckStep::Ask => {}
            CheckStep::End => panic!("never suspect"),
        }
    }
    assert!(now < start + FAILOVER_DELAY, "{:?}", now - start);
}

/// A client can query any name whose authoritative servers are slow, silent or failing.
#[test]
fn an_unanswered_query_does_not_make_a_live_server_suspect() {
    let mut health = Health::new(8);
    let start = Instant::now();
    let servers = [(DEAD, None, Some(20)), (ALIVE, Some(1), Some(1))];
    for number in 0..50 {
        let (winner, _) = run(&mut health, &servers, start + ms(number * 10_000));
        assert_eq!(winner, Some(server(ALIVE)));
        assert!(!is_suspect(&health, DEAD), "after {number} queries");
        let (failover, checks) = health.begin_failover(&[server(DEAD), server(ALIVE)], start);
        assert_eq!(failover.candidates[0].server, server(DEAD));
        assert!(checks.is_empty());
    }
}

#[test]
fn a_server_that_starts_late_is_trusted_from_its_first_response() {
    let mut health = Health::new(8);
    let start = Instant::now();
    let mut check = health.check_silent(server(DEAD), start, start).unwrap();
    assert_eq!(check.step(start), CheckStep::Ask);
    assert!(check.refused() && health.check_failed(&check, start));
    assert!(!check.refused(), "a check fails once");
    let mut now = start;
    while check.step(now) != CheckStep::Ask {
        now += ms(1);
    }
    assert!(now < start + SUSPICION);
    assert!(!matches!(check.step(now + CHECK_DURATION), CheckStep::Ask), "one more query only");
    assert!(health.responded(server(DEAD), now));
    assert!(!is_suspect(&health, DEAD));
}

#[test]
fn a_server_that_responds_to_any_query_is_not_checked() {
    let mut health = Health::new(8);
    let start = Instant::now();
    health.responded(server(ALIVE), start + ms(10));
    assert!(health.check_silent(server(ALIVE), start, start + CHECK_DELAY).is_none());
    let check = health.check_silent(server(ALIVE), start + ms(20), start + ms(80)).unwrap();
    assert!(
        health.check_silent(server(ALIVE), start + ms(20), start + ms(90)).is_none(),
        "one check at a time"
    );
    health.responded(server(ALIVE), start + ms(100));
    assert!(!health.check_failed(&check, start + ms(230)), "it has responded to another query");
    assert!(!is_suspect(&health, ALIVE));
}

#[test]
fn the_grace_of_a_check_follows_the_round_trip_time() {
    let mut health = Health::new(8);
    let start = Instant::now();
    let far = [(DEAD, Some(600), Some(600)), (ALIVE, Some(1), Some(1))];
    health.note_response_time(server(DEAD), ms(600), start);
    run(&mut health, &far, start);
    assert!(!is_suspect(&health, DEAD));
    // Without a known round trip time it is suspect until its response arrives.
    let mut health = Health::new(8);
    run(&mut health, &far, start);
    assert!(!is_suspect(&health, DEAD), "its response has arrived");
}

#[test]
fn a_recovered_server_is_queried_first_again() {
    let mut health = Health::new(8);
    let start = Instant::now();
    run(&mut health, &[(DEAD, None, None), (ALIVE, Some(10), Some(10))], start);
    let back = [(DEAD, Some(1), Some(1)), (ALIVE, Some(10), Some(10))];
    let (winner, _) = run(&mut health, &back, start + ms(4_000));
    assert_eq!(winner, Some(server(ALIVE)), "not yet");
    // The check runs in parallel with this query, which goes to the other server.
    let (winner, took) = run(&mut health, &back, start + ms(6_000));
    assert_eq!((winner, took), (Some(server(ALIVE)), ms(10)));
    let (mut failover, checks) =
        health.begin_failover(&[server(DEAD), server(ALIVE)], start + ms(7_000));
    assert_eq!(failover.step(start + ms(7_000)), Step::Ask(server(DEAD)));
    assert!(checks.is_empty());
}

#[test]
fn one_check_at_a_time_runs_for_a_suspect_server() {
    let mut health = Health::new(8);
    let start = Instant::now();
    run(&mut health, &[(DEAD, None, None), (ALIVE, Some(10), Some(10))], start);
    let list = [server(DEAD), server(ALIVE)];
    let later = start + ms(6_000);
    let (mut first, checks) = health.begin_failover(&list, later);
    assert_eq!(checks.len(), 1);
    let (mut second, checks) = health.begin_failover(&list, later);
    assert!(checks.is_empty());
    for failover in [&mut first, &mut second] {
        assert_eq!(failover.step(later), Step::Ask(server(ALIVE)));
    }
}

#[test]
fn slow_servers_do_not_become_suspect() {
    let mut health = Health::new(8);
    let start = Instant::now();
    let slow = (ALIVE, Some(2_000), Some(5));
    assert_eq!(run(&mut health, &[slow], start), (Some(server(ALIVE)), ms(2_000)));
    run(&mut health, &[(DEAD, Some(2_000), Some(5)), slow], start);
    assert!(health.figures().all(|(_, trusted, figures)| trusted && figures.missed == 0));
}

/// With a delay that follows response times, a client could change it for others.
#[test]
fn the_failover_delay_does_not_depend_on_other_queries() {
    let mut health = Health::new(8);
    let start = Instant::now();
    for number in 0..1_000 {
        health.note_response_time(server(DEAD), Duration::from_micros(50), start + ms(number));
        health.responded(server(DEAD), start + ms(number));
    }
    let servers = [(DEAD, Some(190), Some(1)), (ALIVE, Some(1), Some(1))];
    let took = run(&mut health, &servers, start + ms(2_000));
    assert_eq!(took, (Some(server(DEAD)), ms(190)));
}

#[test]
fn after_a_failure_the_next_server_is_queried_at_once() {
    let mut health = Health::new(8);
    let now = Instant::now();
    let (mut failover, _) = health.begin_failover(&[server(DEAD), server(ALIVE)], now);
    assert_eq!(failover.step(now), Step::Ask(server(DEAD)));
    failover.failed(server(DEAD), now + ms(1));
    assert_eq!(failover.step(now + ms(1)), Step::Ask(server(ALIVE)));
    failover.failed(server(ALIVE), now + ms(2));
    assert_eq!(failover.step(now + ms(2)), Step::GiveUp);
}

#[test]
fn a_query_ends_at_its_deadline() {
    let mut health = Health::new(8);
    let now = Instant::now();
    let nobody = [(DEAD, None, None), (ALIVE, None, None)];
    assert_eq!(run(&mut health, &nobody, now), (None, DEADLINE));
    assert_eq!(run(&mut health, &nobody, now + ms(30_000)), (None, DEADLINE));
    assert_eq!(
        run(&mut health, &nobody, now + ms(90_000)),
        (None, SHORT_DEADLINE),
        "two checks in a row have failed"
    );
    assert_eq!(run(&mut health, &[], now), (None, Duration::ZERO));
}

#[test]
fn queries_are_retransmitted_to_a_single_server() {
    let mut health = Health::new(8);
    let start = Instant::now();
    let (mut failover, _) = health.begin_failover(&[server(ALIVE)], start);
    let mut asked = Vec::new();
    let mut now = start;
    loop {
        match failover.step(now) {
            Step::Ask(_) => asked.push((now - start).as_millis()),
            Step::Silent(..) => {}
            Step::Wait(until) => now = until,
            Step::GiveUp => break,
        }
    }
    assert_eq!(asked, [0, 1_000, 3_000]);
}

/// RFC 6891 section 7: a server without EDNS support responds with FORMERR.
#[test]
fn a_server_without_edns_is_queried_without_it_for_an_hour() {
    let mut health = Health::new(8);
    let now = Instant::now();
    assert!(health.form(server(ALIVE), now).edns);
    health.note_no_edns(server(ALIVE), now);
    assert!(!health.form(server(ALIVE), now + ms(1)).edns);
    assert!(health.form(server(ALIVE), now + FEATURE_LIFETIME).edns);
}

/// Some servers respond with FORMERR or NOTIMP to certain types, and a client chooses the type.
#[test]
fn a_server_that_has_used_edns_is_queried_with_it() {
    let mut health = Health::new(8);
    let now = Instant::now();
    health.note_edns(server(ALIVE), now);
    health.note_no_edns(server(ALIVE), now + ms(1));
    assert!(health.form(server(ALIVE), now + ms(2)).edns);
}

#[test]
fn a_server_that_changes_case_over_tcp_too_is_queried_in_lower_case() {
    let mut health = Health::new(8);
    let now = Instant::now();
    assert!(health.form(server(ALIVE), now).mixed);
    health.note_case_changed(server(ALIVE), Some(false), now);
    assert!(health.form(server(ALIVE), now).mixed, "the response over UDP was forged");
    health.note_case_changed(server(ALIVE), Some(true), now);
    assert!(!health.form(server(ALIVE), now).mixed);
    assert!(health.form(server(ALIVE), now + FEATURE_LIFETIME).mixed);
}

/// One forged response with the right port and ID must not disable the protection.
#[test]
fn without_tcp_several_responses_must_show_changed_case() {
    let mut health = Health::new(8);
    let now = Instant::now();
    for _ in 1..MAX_CASE_CHANGES {
        health.note_case_changed(server(ALIVE), None, now);
        assert!(health.form(server(ALIVE), now).mixed);
    }
    health.note_case_changed(server(ALIVE), None, now);
    assert!(!health.form(server(ALIVE), now).mixed);
    // A server that has preserved case is never classified as changing it.
    let mut health = Health::new(8);
    health.note_case_preserved(server(ALIVE), now);
    for _ in 0..100 {
        health.note_case_changed(server(ALIVE), None, now);
    }
    assert!(health.form(server(ALIVE), now).mixed);
}

#[test]
fn the_number_of_server_states_is_limited() {
    let mut health = Health::new(2);
    for number in 1..=5_u8 {
        health.note_sent((std::net::Ipv4Addr::new(192, 0, 2, number), 53).into());
    }
    let known: Vec<_> = health.figures().map(|(server, ..)| server.ip().to_string()).collect();
    assert_eq!(known, ["192.0.2.4", "192.0.2.5"]);
}

#[test]
fn unreachable_servers_are_queried_again_for_a_while() {
    let mut health = Health::new(8);
    let start = Instant::now();
    let mut now = start;
    let mut asked = Vec::new();
    let (mut failover, _) = health.begin_failover(&[server(ALIVE)], start);
    loop {
        match failover.step(now) {
            Step::Ask(server) => {
                asked.push((now - start).as_millis());
                failover.unreachable(server, now);
            }
            Step::Silent(..) => panic!("it is known to be unreachable"),
            Step::Wait(until) => now = until,
            Step::GiveUp => break,
        }
    }
    assert_eq!(asked, [0, 100, 300, 700]);
    let check = health.check_silent(server(ALIVE), start, start).unwrap();
    health.check_failed(&check, start);
    health.check_failed(&check, start + ms(60_000));
    let later = start + ms(61_000);
    let (mut failover, _) = health.begin_failover(&[server(ALIVE)], later);
    assert_eq!(failover.step(later), Step::Ask(server(ALIVE)));
    failover.unreachable(server(ALIVE), later);
    assert_eq!(
        failover.step(later),
        Step::GiveUp,
        "no repetition for servers that failed their checks"
    );
}
