//! The conditions of a measurement.

use std::fs;
use std::process::Command;
use std::thread;

use tidegate_testbed::version_line;

use crate::contender::Contender;
use crate::lab::Lab;
use crate::options::Options;

/// The machine, the programs and the parameters of a run.
pub(crate) struct Machine {
    /// The start of the run in UTC: `2026-09-13T10:20Z`.
    pub(crate) date: String,
    pub(crate) kernel: String,
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    /// The load average of the minute before the run, caused by other programs.
    pub(crate) load_before: String,
    /// The TCP congestion control in the namespaces.
    pub(crate) congestion_control: String,
    /// The name and version of every program in the run.
    pub(crate) versions: Vec<(String, String)>,
    pub(crate) rounds: u32,
    pub(crate) seconds: u64,
    pub(crate) quick: bool,
}

impl Machine {
    /// Collects the conditions.
    pub(crate) fn describe(options: &Options, contenders: &[Contender]) -> Self {
        let lab = Lab::new(&options.congestion_control);
        let mut versions = vec![("iperf3".to_owned(), version("iperf3", "--version"))];
        versions.extend(contenders.iter().map(|one| (one.kind.name().to_owned(), one.version())));
        Self {
            date: command("date", &["-u", "+%Y-%m-%dT%H:%MZ"]),
            kernel: format!("Linux {}", read("/proc/sys/kernel/osrelease").trim()),
            cpu: cpu_model(&read("/proc/cpuinfo")),
            cores: thread::available_parallelism().map_or(1, usize::from),
            load_before: read("/proc/loadavg").split(' ').next().unwrap_or_default().to_owned(),
            congestion_control: lab.net.host.read_sysctl("net.ipv4.tcp_congestion_control"),
            versions,
            rounds: options.rounds,
            seconds: options.seconds,
            quick: options.quick,
        }
    }

    /// The date of the run, for file names.
    pub(crate) fn day(&self) -> &str {
        self.date.split('T').next().unwrap_or_default()
    }

    /// The conditions in two lines.
    pub(crate) fn summary(&self) -> String {
        format!(
            "{}, {}, {} cores, load {} before the run, TCP congestion control {}\n{}: {} of {} s per cell, alternating{}",
            self.kernel,
            self.cpu,
            self.cores,
            self.load_before,
            self.congestion_control,
            self.date,
            if self.rounds == 1 { "1 round".to_owned() } else { format!("{} rounds", self.rounds) },
            self.seconds,
            if self.quick { " (quick: the figures are not meaningful)" } else { "" },
        )
    }
}

fn version(program: &str, option: &str) -> String {
    version_line(program, &[option]).unwrap_or_else(|| "unknown version".to_owned())
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn command(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    output
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .unwrap_or_default()
}

/// The first `model name` of `/proc/cpuinfo`, which exists only on some architectures.
fn cpu_model(cpuinfo: &str) -> String {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"));
    let name = line.and_then(|line| line.split_once(':')).map(|(_, name)| name.trim());
    name.unwrap_or("unknown CPU").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_model_is_found() {
        assert_eq!(cpu_model("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t: fpu\n"), "AMD EPYC");
        assert_eq!(cpu_model(""), "unknown CPU");
    }
}
