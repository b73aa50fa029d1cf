//! The command line of the benchmark.

use std::path::PathBuf;

use clap::Parser;

/// Compares published ports of tidegate with other ways to publish a port.
///
/// Runs as root; all traffic stays in temporary network namespaces.
#[derive(Clone, Debug, Parser)]
#[command(name = "compare")]
pub(crate) struct Options {
    /// Rounds; each runs every cell once for every contender
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=50))]
    pub(crate) rounds: u32,

    /// Seconds of load per cell
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=60))]
    pub(crate) seconds: u64,

    /// One short round with fewer cells, to check that everything runs; its figures are not
    /// meaningful
    #[arg(long)]
    pub(crate) quick: bool,

    /// Only these cells or groups of cells: tcp, tcp.1, tcp.1.up, requests, connections, udp,
    /// idle, ports, stalled, forward, rules, setup, egress, neighbour, daemon
    #[arg(long, value_delimiter = ',')]
    pub(crate) only: Vec<String>,

    /// Only these contenders: dnat, docker-proxy, haproxy, socat, netavark, tidegate,
    /// tidegate-netns, drop-in, docker-rules, docker-rules-2, nftables, iptables, masquerade,
    /// slirp4netns, pasta, engine
    #[arg(long, value_delimiter = ',')]
    pub(crate) contenders: Vec<String>,

    /// TCP congestion control in all namespaces
    #[arg(long, default_value = "reno")]
    pub(crate) congestion_control: String,

    /// Directory for the results as JSON, SVG and Markdown; without it, none are written
    #[arg(long)]
    pub(crate) out: Option<PathBuf>,

    /// File name of the results, without extension [default: DATE-compare]
    #[arg(long)]
    pub(crate) name: Option<String>,

    /// Exit with 1 if a floor does not hold
    #[arg(long)]
    pub(crate) enforce: bool,

    /// Passed by `cargo bench`; without it (`cargo test --benches`) nothing is measured
    #[arg(long, hide = true)]
    pub(crate) bench: bool,
}

impl Options {
    /// Parses the command line of this process.
    pub(crate) fn from_args() -> Self {
        let mut options = Self::parse();
        if options.quick {
            options.rounds = 1;
            options.seconds = 1;
        }
        options
    }

    /// Whether the cell `name`, or one of its groups, is selected.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|group| is_within(name, group))
    }
}

/// Whether the dotted `name` is `group` or below it.
fn is_within(name: &str, group: &str) -> bool {
    name.strip_prefix(group).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_end_at_dots() {
        assert!(is_within("tcp.1.up", "tcp"));
        assert!(is_within("tcp.1.up", "tcp.1"));
        assert!(is_within("tcp.1.up", "tcp.1.up"));
        assert!(!is_within("tcp.16.up", "tcp.1"));
        assert!(!is_within("tcp.1.up", "tcp.1.up.rate"));
    }
}
