//! Compares published ports of tidegate with DNAT by the kernel, Docker's docker-proxy, haproxy and
//! socat, and its networks with those of netavark.
//!
//! ```text
//! cargo bench --bench compare                                  everything: about 15 min, as root
//! cargo bench --bench compare -- --quick                       one short round of each cell
//! cargo bench --bench compare -- --only tcp.1,udp --rounds 3   some of the cells
//! cargo bench --bench compare -- --out benches/results         with JSON, SVG and Markdown
//! ```
//!
//! The client, the host and the container are network namespaces connected by veth pairs and a
//! bridge, created anew for every cell. A cell is one load ([`scenario`]) on one way to publish a
//! port ([`contender`]). Rounds alternate the contenders ([`schedule`]). Each target of tidegate is
//! judged by the worst of its cells ([`figures`]). `TIDEGATE_BENCH_BIN` and
//! `TIDEGATE_BENCH_DOCKER_PROXY` replace the binaries that Cargo built.

// Cargo sets `test` for a benchmark. Without the test harness, the tests in the modules below are
// unused, and so is the code that only they need. The target `bench_compare` (tests.rs) runs them.
#![cfg_attr(test, allow(dead_code, unused_imports))]

mod contender;
mod figures;
mod iperf;
mod lab;
mod load;
mod machine;
mod options;
mod report;
mod results;
mod scenario;
mod schedule;
mod stats;

use std::env;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, ensure};
use tidegate_testbed::{debian_package, find_program, raise_open_files, require_root};

use contender::Contender;
use figures::{Outcome, Verdict, judge_all};
use machine::Machine;
use options::Options;
use report::Report;

/// The requested limit of open files: docker-proxy holds six for each of 10,000 idle connections.
///
/// With a lower hard limit, that cell stops at the limit and reports it.
const OPEN_FILES: u64 = 100_000;

fn main() -> ExitCode {
    let options = Options::from_args();
    if !options.bench {
        println!("no measurement without --bench, which `cargo bench` passes");
        return ExitCode::SUCCESS;
    }
    match compare(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) if !options.enforce => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("compare: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the selected cells and prints the report. Returns whether every floor held.
fn compare(options: &Options) -> Result<bool> {
    require_root();
    let _lock = lock()?;
    raise_open_files(OPEN_FILES);
    let contenders = contenders(options)?;
    let mut scenarios = scenario::all(options);
    if find_program("iperf3").is_none() {
        let cells = scenarios.len();
        scenarios.retain(|scenario| !scenario.name().starts_with("tcp."));
        if scenarios.len() < cells {
            leave_out(anyhow!(
                "iperf3 is not installed: apt-get install {}",
                debian_package("iperf3")
            ))?;
        }
    }
    ensure!(!scenarios.is_empty(), "none of the selected cells can be measured");
    let machine = Machine::describe(options, &contenders);
    eprintln!("{}", machine.summary());

    let results = schedule::run(options, &scenarios, &contenders);
    let outcomes = judge_all(&results);
    let report = Report { machine: &machine, outcomes: &outcomes, results: &results };
    print!("{}", report.text());
    if let Some(directory) = &options.out {
        let stem = options.name.clone().unwrap_or_else(|| format!("{}-compare", machine.day()));
        for path in report.write(directory, &stem)? {
            println!("wrote {}", path.display());
        }
    }
    Ok(results.failures.is_empty() && outcomes.iter().all(|outcome| holds(outcome, options)))
}

/// Prevents a second comparison on the machine, which would disturb the first.
///
/// The lock is a Unix socket with an abstract name, which the kernel releases with the process.
fn lock() -> Result<UnixListener> {
    let name = SocketAddr::from_abstract_name("tidegate-compare")?;
    UnixListener::bind_addr(&name).context("another comparison is running on this machine")
}

/// Whether the floor of a figure holds. In a partial run, cells without a measurement are ignored.
fn holds(outcome: &Outcome, options: &Options) -> bool {
    let partial = options.quick || !options.only.is_empty() || !options.contenders.is_empty();
    match outcome.verdict {
        Verdict::Stretch | Verdict::Floor => true,
        Verdict::Missed => false,
        Verdict::NotMeasured => partial,
    }
}

/// The contenders of this run.
fn contenders(options: &Options) -> Result<Vec<Contender>> {
    for name in &options.contenders {
        ensure!(
            contender::ALL.iter().any(|kind| kind.name() == name),
            "unknown contender {name:?}"
        );
    }
    let wanted =
        |name| options.contenders.is_empty() || options.contenders.iter().any(|one| one == name);
    let mut found = Vec::new();
    for kind in contender::ALL.into_iter().filter(|kind| wanted(kind.name())) {
        match Contender::find(kind) {
            Ok(contender) => found.push(contender),
            Err(error) if kind.is_ours() => return Err(error),
            Err(error) => leave_out(error)?,
        }
    }
    Ok(found)
}

/// Continues without a missing program, with a warning.
///
/// # Errors
///
/// In CI, `missing` itself: a comparison without one of its peers proves less than it seems to.
fn leave_out(missing: anyhow::Error) -> Result<()> {
    if env::var_os("CI").is_some_and(|value| value != "false") {
        return Err(missing);
    }
    eprintln!("WARNING: left out of the comparison: {missing:#}");
    Ok(())
}
