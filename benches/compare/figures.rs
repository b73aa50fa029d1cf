//! The performance targets of tidegate as data, and the verdict on each.
//!
//! A figure is the worst of its cells. A missed floor is a failure; a missed stretch target is
//! reported.
//!
//! The worst of several cells of two equal contenders is almost always below par, because the
//! contenders alternate in the lead. A figure whose target is par therefore combines all rounds of
//! all its cells. It is missed if the combined value is significantly less than 1.

use crate::contender::Kind;
use crate::results::Results;
use crate::stats::{Summary, is_less_than_one};

/// A performance target.
pub(crate) struct Figure {
    pub(crate) title: &'static str,
    /// The metrics; the worst one counts.
    pub(crate) cells: &'static [&'static str],
    /// The contender whose values are judged.
    pub(crate) subject: Kind,
    /// The peer of a ratio; `None` for an absolute value.
    pub(crate) against: Option<Kind>,
    pub(crate) better: Better,
    pub(crate) floor: f64,
    pub(crate) stretch: Option<f64>,
    /// Whether the floor is parity with the peer.
    pub(crate) at_par: bool,
    /// The unit, `x` for a ratio.
    pub(crate) unit: &'static str,
}

/// The direction in which a figure improves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Better {
    More,
    Less,
}

/// The result of a figure.
pub(crate) struct Outcome {
    pub(crate) figure: &'static Figure,
    /// The worst cell, or the combination of all of them, with its value; `None` without a
    /// measurement.
    pub(crate) worst: Option<(&'static str, Summary)>,
    pub(crate) verdict: Verdict,
}

/// The comparison of a figure with its targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The stretch target is reached, or the floor of a figure without one.
    Stretch,
    /// The floor holds.
    Floor,
    /// The floor does not hold.
    Missed,
    /// There is no measurement.
    NotMeasured,
}

const ONE_STREAM: &[&str] = &["tcp.1.up.rate", "tcp.1.down.rate"];
const FORWARD: &[&str] =
    &["forward.1.up.rate", "forward.1.down.rate", "forward.16.up.rate", "forward.16.down.rate"];
const CPU: &[&str] = &[
    "tcp.1.up.cpu",
    "tcp.1.down.cpu",
    "tcp.4.up.cpu",
    "tcp.4.down.cpu",
    "tcp.16.up.cpu",
    "tcp.16.down.cpu",
];

const NEIGHBOUR_MEDIAN: &[&str] = &["neighbour.syn.median", "neighbour.spoofed.median"];
const NEIGHBOUR_P99: &[&str] = &["neighbour.syn.p99", "neighbour.spoofed.p99"];

/// All performance targets.
pub(crate) const FIGURES: &[Figure] = &[
    ratio("TCP throughput, 1 stream / docker-proxy", ONE_STREAM, Kind::Publish, Kind::DockerProxy)
        .at_least(1.3, 1.6),
    ratio(
        "TCP throughput, 1 stream, in the namespace / DNAT",
        ONE_STREAM,
        Kind::PublishNetns,
        Kind::Dnat,
    )
    .at_least(0.9, 1.1),
    ratio("TCP throughput, 1 stream / DNAT", ONE_STREAM, Kind::Publish, Kind::Dnat)
        .at_least(0.8, 0.95),
    ratio("CPU per GB / docker-proxy", CPU, Kind::Publish, Kind::DockerProxy).at_most(0.50, 0.33),
    ratio(
        "requests/s, 64 connections / docker-proxy",
        &["requests.rate"],
        Kind::Publish,
        Kind::DockerProxy,
    )
    .at_least(1.3, 1.7),
    ratio(
        "new connections/s / docker-proxy",
        &["connections.1.rate", "connections.32.rate"],
        Kind::Publish,
        Kind::DockerProxy,
    )
    .at_least(1.6, 2.0),
    ratio(
        "UDP received, 1200 B / docker-proxy",
        &["udp.1200.rate"],
        Kind::Publish,
        Kind::DockerProxy,
    )
    .at_least(2.5, 3.0),
    ratio(
        "UDP received, GSO sender / docker-proxy",
        &["udp.1200-gso.rate"],
        Kind::Publish,
        Kind::DockerProxy,
    )
    .at_least(10.0, 14.0),
    value("RSS per idle connection", &["idle.1000", "idle.10000"], Kind::Publish, "KB")
        .at_most(1.5, 0.5),
    value("10,000 ports: RSS", &["ports.10000.memory"], Kind::Publish, "MB").at_most(64.0, 24.0),
    value("10,000 ports: time to ready", &["ports.10000.ready"], Kind::Publish, "s")
        .at_most(1.0, 0.3),
    value("docker-proxy drop-in, idle: PSS", &["ports.pair"], Kind::DropIn, "MB").at_most(1.2, 0.8),
    value("buffered for a stalled peer", &["stalled"], Kind::Publish, "MB").below(4.0),
    ratio(
        "network with one endpoint: set up / netavark",
        &["setup.netavark.none.ready", "setup.netavark.nftables.ready"],
        Kind::Publish,
        Kind::Netavark,
    )
    .below(0.5),
    value(
        "1,000 endpoints and ports, no firewall: set up",
        &["setup.1000.4.none.ready"],
        Kind::Publish,
        "s",
    )
    .below(3.0),
    value(
        "1,000 endpoints and ports, with a firewall: set up",
        &[
            "setup.1000.4.nftables.ready",
            "setup.1000.1.nftables.ready",
            "setup.1000.4.iptables.ready",
        ],
        Kind::Publish,
        "s",
    )
    .at_most(4.0, 2.0),
    value(
        "10,000 ports in nftables: one more or less",
        &["rules.10000.update"],
        Kind::Publish,
        "ms",
    )
    .at_most(100.0, 20.0),
    value(
        "rules for 10,000 ports, less those for one",
        &["rules.10000.more"],
        Kind::Publish,
        "rules",
    )
    .at_most(0.0, 0.0),
    value(
        "daemon, 1,000 endpoints in 100 networks: attach one more, median",
        &["daemon.1000.100.attach"],
        Kind::Publish,
        "ms",
    )
    .at_most(30.0, 10.0),
    value(
        "daemon, 1,000 endpoints in 100 networks: restart",
        &["daemon.1000.100.restart"],
        Kind::Publish,
        "s",
    )
    .at_most(3.0, 1.0),
    value(
        "daemon, 1,000 endpoints in 100 networks: memory",
        &["daemon.1000.100.memory"],
        Kind::Publish,
        "MB",
    )
    .at_most(64.0, 32.0),
    ratio(
        "published by the kernel / Docker's rules",
        FORWARD,
        Kind::KernelNftables,
        Kind::DockerRules,
    )
    .at_par(),
    ratio(
        "Docker's rules once more / Docker's rules",
        FORWARD,
        Kind::DockerRulesAgain,
        Kind::DockerRules,
    )
    .at_par(),
    egress("egress, TCP up / slirp4netns", &["egress.tcp.1500.1.up.rate"], Kind::Slirp)
        .at_least(24.0, 30.0),
    egress("egress, TCP down / slirp4netns", &["egress.tcp.1500.1.down.rate"], Kind::Slirp)
        .at_least(6.0, 10.0),
    egress("egress, TCP up / pasta", &["egress.tcp.1500.1.up.rate"], Kind::Pasta)
        .at_least(7.0, 10.0),
    egress("egress, TCP down / pasta", &["egress.tcp.1500.1.down.rate"], Kind::Pasta)
        .at_least(12.0, 15.0),
    egress("egress, TCP up / masquerade", &["egress.tcp.1500.1.up.rate"], Kind::Masquerade)
        .at_least(0.7, 0.95),
    egress("egress, TCP down / masquerade", &["egress.tcp.1500.1.down.rate"], Kind::Masquerade)
        .at_least(0.55, 0.8),
    egress("egress, MTU 65520, TCP up / slirp4netns", &["egress.tcp.65520.1.up.rate"], Kind::Slirp)
        .at_least(2.3, 3.0),
    egress(
        "egress, MTU 65520, TCP down / slirp4netns",
        &["egress.tcp.65520.1.down.rate"],
        Kind::Slirp,
    )
    .at_least(3.0, 4.0),
    egress("egress, CPU per GB up / slirp4netns", &["egress.tcp.1500.1.up.cpu"], Kind::Slirp)
        .at_most(1.0 / 24.0, 1.0 / 30.0),
    egress("egress, CPU per GB down / slirp4netns", &["egress.tcp.1500.1.down.cpu"], Kind::Slirp)
        .at_most(1.0 / 7.0, 1.0 / 10.0),
    egress("egress, UDP 1200 B up / slirp4netns", &["egress.udp.up.rate"], Kind::Slirp)
        .at_least(2.4, 3.0),
    egress("egress, UDP 1200 B down / slirp4netns", &["egress.udp.down.rate"], Kind::Slirp)
        .at_least(1.6, 2.5),
    egress(
        "egress, new connections, 16 at a time / slirp4netns",
        &["egress.connections.16.rate"],
        Kind::Slirp,
    )
    .at_least(1.4, 2.0),
    egress(
        "egress, new connections, 16 at a time / masquerade",
        &["egress.connections.16.rate"],
        Kind::Masquerade,
    )
    .at_least(0.6, 0.75),
    value("egress, RSS with 5,000 connections", &["egress.held.memory"], Kind::Engine, "MB")
        .at_most(8.0, 4.0),
    value(
        "beside a flood: neighbour's median / dropped at its port",
        NEIGHBOUR_MEDIAN,
        Kind::Publish,
        "x",
    )
    .below(2.0),
    value(
        "beside a flood: neighbour's p99 / dropped at its port",
        NEIGHBOUR_P99,
        Kind::Publish,
        "x",
    )
    .below(5.0),
];

const fn ratio(
    title: &'static str,
    cells: &'static [&'static str],
    subject: Kind,
    peer: Kind,
) -> Figure {
    Figure { against: Some(peer), ..value(title, cells, subject, "x") }
}

const fn egress(title: &'static str, cells: &'static [&'static str], peer: Kind) -> Figure {
    ratio(title, cells, Kind::Engine, peer)
}

const fn value(
    title: &'static str,
    cells: &'static [&'static str],
    subject: Kind,
    unit: &'static str,
) -> Figure {
    Figure {
        title,
        cells,
        subject,
        against: None,
        better: Better::Less,
        floor: 0.0,
        stretch: None,
        at_par: false,
        unit,
    }
}

impl Figure {
    const fn at_least(self, floor: f64, stretch: f64) -> Self {
        Self { better: Better::More, floor, stretch: Some(stretch), ..self }
    }

    const fn at_par(self) -> Self {
        Self { at_par: true, ..self.at_least(1.0, 1.0) }
    }

    const fn at_most(self, floor: f64, stretch: f64) -> Self {
        Self { stretch: Some(stretch), ..self.below(floor) }
    }

    const fn below(self, floor: f64) -> Self {
        Self { better: Better::Less, floor, ..self }
    }

    /// Judges all rounds of all cells together.
    fn judge_par(&'static self, results: &Results) -> Outcome {
        let of = |cell| self.against.map(|peer| results.ratios(cell, self.subject, peer));
        let ratios: Vec<f64> = self.cells.iter().filter_map(|cell| of(cell)).flatten().collect();
        let all = Summary::of(&ratios);
        let verdict = match all {
            None => Verdict::NotMeasured,
            Some(_) if is_less_than_one(&ratios) => Verdict::Missed,
            Some(all) if all.median >= 1.0 => Verdict::Stretch,
            Some(_) => Verdict::Floor,
        };
        Outcome { figure: self, worst: all.map(|all| ("all of them", all)), verdict }
    }

    /// Judges the worst cell.
    pub(crate) fn judge(&'static self, results: &Results) -> Outcome {
        if self.at_par {
            return self.judge_par(results);
        }
        let measured = self.cells.iter().filter_map(|cell| {
            let summary = match self.against {
                Some(peer) => results.ratio(cell, self.subject, peer),
                None => results.summary(cell, self.subject),
            };
            Some((*cell, summary?))
        });
        let worst = measured.reduce(|worst, next| {
            if self.better.reaches(next.1.median, worst.1.median) { worst } else { next }
        });
        let verdict = match (worst, self.stretch) {
            (None, _) => Verdict::NotMeasured,
            (Some((_, worst)), _) if !self.better.reaches(worst.median, self.floor) => {
                Verdict::Missed
            }
            (Some((_, worst)), Some(stretch)) if !self.better.reaches(worst.median, stretch) => {
                Verdict::Floor
            }
            (Some(_), _) => Verdict::Stretch,
        };
        Outcome { figure: self, worst, verdict }
    }
}

impl Better {
    /// Whether `value` is at least as good as `bound`.
    fn reaches(self, value: f64, bound: f64) -> bool {
        match self {
            Self::More => value >= bound,
            Self::Less => value <= bound,
        }
    }
}

impl Verdict {
    /// The text in tables.
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Stretch => "stretch",
            Self::Floor => "floor holds",
            Self::Missed => "MISSED",
            Self::NotMeasured => "not measured",
        }
    }
}

/// Judges all figures.
pub(crate) fn judge_all(results: &Results) -> Vec<Outcome> {
    FIGURES.iter().map(|figure| figure.judge(results)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::results;

    static UP: Figure =
        ratio("up", &["x", "y"], Kind::Publish, Kind::DockerProxy).at_least(1.5, 2.0);
    static DOWN: Figure = value("down", &["x"], Kind::Publish, "MB").at_most(10.0, 5.0);
    static LIMIT: Figure = value("limit", &["x"], Kind::Publish, "MB").below(10.0);

    fn verdict(figure: &'static Figure, ours: f64) -> Verdict {
        let cells: [(Kind, &[f64]); 2] = [(Kind::Publish, &[ours]), (Kind::DockerProxy, &[1.0])];
        figure.judge(&results("x", &cells)).verdict
    }

    #[test]
    fn a_value_at_its_bound_holds() {
        assert_eq!(verdict(&UP, 2.0), Verdict::Stretch);
        assert_eq!(verdict(&UP, 1.5), Verdict::Floor);
        assert_eq!(verdict(&UP, 1.49), Verdict::Missed);
        assert_eq!(verdict(&DOWN, 5.0), Verdict::Stretch);
        assert_eq!(verdict(&DOWN, 10.0), Verdict::Floor);
        assert_eq!(verdict(&DOWN, 10.1), Verdict::Missed);
        assert_eq!(verdict(&LIMIT, 9.0), Verdict::Stretch);
    }

    #[test]
    fn the_worst_cell_counts() {
        let cells = |ours| [(Kind::Publish, ours), (Kind::DockerProxy, &[1.0] as &[f64])];
        let mut both = results("x", &cells(&[3.0]));
        let other = results("y", &cells(&[1.6]));
        for kind in [Kind::Publish, Kind::DockerProxy] {
            both.add(&other.metrics[0], kind, 0, other.samples("y", kind)[0]);
        }
        let outcome = UP.judge(&both);
        assert_eq!(outcome.worst.unwrap().0, "y");
        assert_eq!(outcome.verdict, Verdict::Floor);
    }

    #[test]
    fn par_is_missed_only_beyond_chance() {
        static PAR: Figure = ratio("par", &["x"], Kind::Publish, Kind::DockerProxy).at_par();
        let judge = |ours: &[f64]| {
            let theirs = vec![1.0; ours.len()];
            PAR.judge(&results("x", &[(Kind::Publish, ours), (Kind::DockerProxy, &theirs)])).verdict
        };
        let around = |middle: f64| -> Vec<f64> {
            (0..16).map(|round| middle + f64::from(round % 4) * 0.02 - 0.03).collect()
        };
        assert_eq!(judge(&around(1.0)), Verdict::Stretch);
        assert_eq!(judge(&around(0.995)), Verdict::Floor, "within chance");
        assert_eq!(judge(&around(0.96)), Verdict::Missed);
        assert_eq!(judge(&[]), Verdict::NotMeasured);
    }

    #[test]
    fn without_samples_there_is_no_verdict() {
        assert_eq!(UP.judge(&Results::default()).verdict, Verdict::NotMeasured);
    }
}
