use super::*;

const DEAD: &str = "192.0.2.1:53";
const ALIVE: &str = "192.0.2.2:53";

fn server(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn ms(number: u64) -> Duration {
    Duration::from_millis(number)
}

/// Pursues a question among servers that answer after `takes`, or never; who won, and when.
fn run(
    health: &mut Health,
    servers: &[(&str, Option<u64>)],
    start: Instant,
) -> (Option<SocketAddr>, Duration) {
    let list: Vec<_> = servers.iter().map(|(name, _)| server(name)).collect();
    let mut pursuit = health.pursue(&list, start);
    let mut asked: Vec<(SocketAddr, Instant)> = Vec::new();
    let mut now = start;
    for _ in 0..100 {
        let until = match pursuit.step(now) {
            Step::Ask(server) => {
                asked.push((server, now));
                continue;
            }
            Step::GiveUp => {
                for silent in pursuit.silent(now, None) {
                    health.missed(silent, now);
                }
                return (None, now - start);
            }
            Step::Wait(until) => until,
        };
        let answers = asked.iter().filter_map(|(one, at)| {
            let takes = servers.iter().find(|(name, _)| server(name) == *one)?.1?;
            Some((*at + ms(takes), *one))
        });
        let Some((at, winner)) = answers.min().filter(|(at, _)| *at <= until) else {
            now = until;
            continue;
        };
        let sent = asked.iter().find(|(one, _)| *one == winner).unwrap().1;
        health.answered(winner, at - sent);
        pursuit.heard(winner);
        let probed = pursuit.probe().map(|(server, _)| server);
        for silent in pursuit.silent(at, Some(winner)) {
            if Some(silent) != probed {
                health.missed(silent, at);
            }
        }
        if let Some((probe, until)) = pursuit.probe() {
            health.missed(probe, until);
        }
        return (Some(winner), at - start);
    }
    panic!("it does not end");
}

/// Issue threads of libnetwork and moby ask for this above all: a dead first server costs once.
#[test]
fn a_dead_first_server_costs_one_question_its_patience_and_others_nothing() {
    let mut health = Health::new(8);
    let servers = [(DEAD, None), (ALIVE, Some(10))];
    let start = Instant::now();
    let (winner, took) = run(&mut health, &servers, start);
    assert_eq!((winner, took), (Some(server(ALIVE)), PATIENCE + ms(10)));
    for later in [1, 100, 4_000, 6_000, 20_000, 90_000] {
        let (winner, took) = run(&mut health, &servers, start + ms(later));
        assert_eq!((winner, took), (Some(server(ALIVE)), ms(10)), "after {later} ms");
    }
}

#[test]
fn a_server_that_is_back_is_noticed_and_first_again() {
    let mut health = Health::new(8);
    let start = Instant::now();
    run(&mut health, &[(DEAD, None), (ALIVE, Some(10))], start);
    let back = [(DEAD, Some(1)), (ALIVE, Some(10))];
    let (winner, _) = run(&mut health, &back, start + ms(1_000));
    assert_eq!(winner, Some(server(ALIVE)), "not yet");
    // The probe is asked beside the other one, and wins here.
    let (winner, took) = run(&mut health, &back, start + ms(6_000));
    assert_eq!((winner, took), (Some(server(DEAD)), ms(1)));
    let mut pursuit = health.pursue(&[server(DEAD), server(ALIVE)], start + ms(7_000));
    assert_eq!(pursuit.step(start + ms(7_000)), Step::Ask(server(DEAD)));
    assert_eq!(pursuit.probe(), None);
}

#[test]
fn one_question_at_a_time_probes() {
    let mut health = Health::new(8);
    let start = Instant::now();
    run(&mut health, &[(DEAD, None), (ALIVE, Some(10))], start);
    let list = [server(DEAD), server(ALIVE)];
    let later = start + ms(6_000);
    let mut first = health.pursue(&list, later);
    let mut second = health.pursue(&list, later);
    assert_eq!(first.step(later), Step::Ask(server(DEAD)));
    assert_eq!(first.step(later), Step::Ask(server(ALIVE)));
    assert!(first.probe().is_some());
    assert_eq!(second.step(later), Step::Ask(server(ALIVE)));
    assert!(second.probe().is_none());
}

#[test]
fn slow_servers_are_waited_for_and_not_blamed() {
    let mut health = Health::new(8);
    let start = Instant::now();
    assert_eq!(run(&mut health, &[(ALIVE, Some(2_000))], start), (Some(server(ALIVE)), ms(2_000)));
    let both = [(DEAD, Some(2_000)), (ALIVE, Some(2_000))];
    run(&mut health, &both, start);
    assert!(health.figures().all(|(_, trusted, figures)| trusted && figures.missed == 0));
}

#[test]
fn a_failure_brings_the_next_one_on_at_once() {
    let mut health = Health::new(8);
    let now = Instant::now();
    let mut pursuit = health.pursue(&[server(DEAD), server(ALIVE)], now);
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
    let nobody = [(DEAD, None), (ALIVE, None)];
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
    let mut pursuit = health.pursue(&[server(ALIVE)], start);
    let mut asked = Vec::new();
    let mut now = start;
    loop {
        match pursuit.step(now) {
            Step::Ask(_) => asked.push((now - start).as_millis()),
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
    assert!(health.takes_edns(server(ALIVE), now));
    health.plain(server(ALIVE), now);
    assert!(!health.takes_edns(server(ALIVE), now + ms(1)));
    assert!(health.takes_edns(server(ALIVE), now + PLAIN));
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
    let mut pursuit = health.pursue(&[server(ALIVE)], start);
    loop {
        match pursuit.step(now) {
            Step::Ask(server) => {
                asked.push((now - start).as_millis());
                pursuit.gone(server, now);
            }
            Step::Wait(until) => now = until,
            Step::GiveUp => break,
        }
    }
    assert_eq!(asked, [0, 100, 300, 700]);
    health.missed(server(ALIVE), start);
    health.missed(server(ALIVE), start + ms(60_000));
    let later = start + ms(61_000);
    let mut pursuit = health.pursue(&[server(ALIVE)], later);
    assert_eq!(pursuit.step(later), Step::Ask(server(ALIVE)));
    pursuit.gone(server(ALIVE), later);
    assert_eq!(pursuit.step(later), Step::GiveUp, "there is nobody for good");
}
