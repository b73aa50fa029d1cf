//! `make install`, and the units that it installs.

use super::host::TIDEGATE;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output};
use tidegate_testbed::{find_program, require_program};

const UNITS: [&str; 4] = [
    "system/tidegate.service",
    "system/tidegate.socket",
    "user/tidegate.service",
    "user/tidegate.socket",
];

/// The highest rating of `systemd-analyze security`, in tenths.
const MAX_EXPOSURE: u32 = 29;

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Runs `make install` with the binary under test as the release, and a compiler that fails.
#[track_caller]
fn install(variables: &[String]) {
    require_program("make");
    let release = tempfile::tempdir().unwrap();
    symlink(TIDEGATE, release.path().join("tidegate")).unwrap();
    for other in ["docker-proxy", "slirp4netns"] {
        fs::write(release.path().join(other), "#!/bin/sh\n").unwrap();
    }
    let mut make = Command::new("make");
    // This test may run in a recipe of make.
    make.env_remove("MAKEFLAGS").env_remove("MAKELEVEL").env_remove("DESTDIR");
    make.current_dir(env!("CARGO_MANIFEST_DIR")).args(["install", "CARGO=false"]);
    make.arg(format!("RELEASE={}", release.path().display())).args(variables);
    let output = make.output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
}

#[track_caller]
fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn make_install_installs_units_that_start_the_installed_program() {
    let root = tempfile::tempdir().unwrap();
    install(&[format!("DESTDIR={}", root.path().display()), "PREFIX=/usr".to_owned()]);
    let usr = root.path().join("usr");
    for unit in UNITS {
        let path = usr.join("lib/systemd").join(unit);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644, "{unit}");
        if unit.ends_with(".service") {
            let unit = read(&path);
            assert_eq!(values(&unit, "ExecStart"), ["/usr/bin/tidegate daemon"]);
        }
    }
    for file in [
        "bin/tidegate",
        "bin/docker-proxy",
        "bin/slirp4netns",
        "share/man/man1/tidegate-daemon.1",
        "share/bash-completion/completions/tidegate",
        "share/zsh/site-functions/_tidegate",
        "share/fish/vendor_completions.d/tidegate.fish",
        "share/tidegate/projects.conf",
    ] {
        assert!(usr.join(file).is_file(), "{file}");
    }
}

#[test]
fn the_units_are_valid_and_hardened() {
    let prefix = tempfile::tempdir().unwrap();
    install(&[format!("PREFIX={}", prefix.path().display())]);
    let units = prefix.path().join("lib/systemd");
    let started = format!("{}/bin/tidegate daemon", prefix.path().display());
    for unit in ["system/tidegate.service", "user/tidegate.service"] {
        let unit = read(&units.join(unit));
        for (directive, value) in [
            ("Type", "notify"),
            ("ExecStart", &started),
            ("Restart", "on-failure"),
            ("KillMode", "process"),
            ("RuntimeDirectory", "tidegate"),
            ("RuntimeDirectoryPreserve", "yes"),
            ("NoNewPrivileges", "yes"),
        ] {
            assert_eq!(values(&unit, directive), [value], "{directive}");
        }
    }
    for (unit, path) in [
        ("system/tidegate.socket", "/run/tidegate/api.sock"),
        ("user/tidegate.socket", "%t/tidegate/api.sock"),
    ] {
        let unit = read(&units.join(unit));
        assert_eq!(values(&unit, "ListenStream"), [path]);
        assert_eq!(values(&unit, "SocketMode"), ["0600"]);
        assert!(values(&unit, "Accept").is_empty());
    }
    if find_program("systemd-analyze").is_none() {
        // The directives above were checked. Their rating needs systemd-analyze, so the check
        // below compares the directives with the largest weights.
        eprintln!("systemd-analyze is not installed: the units were checked by parsing only");
        let unit = read(&units.join("system/tidegate.service"));
        for (directive, value) in [
            ("ProtectSystem", "strict"),
            ("ProtectHome", "yes"),
            ("PrivateDevices", "yes"),
            ("RestrictNamespaces", "net"),
            ("SystemCallArchitectures", "native"),
            ("MemoryDenyWriteExecute", "yes"),
        ] {
            assert_eq!(values(&unit, directive), [value], "{directive}");
        }
        return;
    }
    let analyze = |args: &[&str], units: &[&str]| {
        let mut command = Command::new("systemd-analyze");
        command.args(args).args(units).current_dir(prefix.path().join("lib/systemd"));
        command.env("XDG_RUNTIME_DIR", prefix.path());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", text(&output));
        text(&output)
    };
    // The manual pages of `PREFIX` are not in the search path of man(1).
    let verify = ["verify", "--man=no", "--recursive-errors=no"];
    let complaints = analyze(&verify, &["system/tidegate.service", "system/tidegate.socket"]);
    assert_eq!(about_tidegate(&complaints), "");
    let verify = ["--user", "verify", "--man=no", "--recursive-errors=no"];
    let complaints = analyze(&verify, &["user/tidegate.service", "user/tidegate.socket"]);
    assert_eq!(about_tidegate(&complaints), "");
    let threshold = format!("--threshold={MAX_EXPOSURE}");
    let security = ["security", "--offline=true", "--no-pager", &threshold];
    let rating = analyze(&security, &["system/tidegate.service"]);
    assert!(rating.contains("Overall exposure level for tidegate.service: "), "{rating}");
}

/// Services of projects are not restricted by the unit of the daemon with the drop-in.
#[test]
fn the_drop_in_for_projects_removes_all_restrictions() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/systemd");
    let drop_in = read(&directory.join("projects.conf"));
    for unit in ["tidegate.service", "user/tidegate.service"] {
        let unit = read(&directory.join(unit));
        let service = unit.split("[Service]").nth(1).unwrap().split("[Install]").next().unwrap();
        let directives = service.lines().filter_map(|line| line.split_once('='));
        for (directive, _) in directives.filter(|(name, _)| !name.starts_with('#')) {
            let is_kept = directive.starts_with("Runtime")
                || directive.starts_with("State")
                || directive.starts_with("Restart")
                || directive.starts_with("Limit")
                || ["Type", "ExecStart", "ExecReload", "KillMode", "UMask"].contains(&directive);
            let removed = values(&drop_in, directive);
            assert_eq!(removed.len(), usize::from(!is_kept), "{directive}");
            let permissive = ["", "no", "~", "default", "inherit"];
            assert!(removed.iter().all(|value| permissive.contains(value)), "{directive}");
        }
    }
}

/// The lines of systemd-analyze about our units. It also complains about units of the machine.
fn about_tidegate(complaints: &str) -> String {
    complaints.lines().filter(|line| line.contains("tidegate")).collect()
}

/// The values of `directive`, in the order of the unit.
pub(super) fn values<'a>(unit: &'a str, directive: &str) -> Vec<&'a str> {
    let lines = unit.lines().filter_map(|line| line.split_once('='));
    lines.filter(|(name, _)| *name == directive).map(|(_, value)| value).collect()
}
