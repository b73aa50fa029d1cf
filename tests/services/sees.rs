//! Mounts, names, environment and output of a service.

use super::*;

#[test]
fn a_service_has_its_own_names_and_network_and_the_host_keeps_its_own() {
    let mut bed = Bed::new(FOREVER);
    bed.namespace.ip(&["link", "add", "tgmark", "type", "veth", "peer", "name", "tgpeer"]);
    let host_files =
        || ["/etc/hosts", "/etc/resolv.conf", "/etc/hostname"].map(|path| fs::read(path).ok());
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap();
    let hostname = || fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let before = (host_files(), mounts(), hostname());
    run(async {
        let script = "hostname; cat /etc/hostname /etc/hosts /etc/resolv.conf; readlink /proc/self/ns/net; \
                      ls -d /sys/class/net/tgmark; cat; echo pids $(ls /proc | grep -c '^[0-9]'); echo ready; \
                      exec sleep 600";
        bed.supervisor.start(vec![bed.shell("web", script)]).await.unwrap();
        bed.lines.wait_for("web | ready").await;
        let network =
            tidegate_netns::Namespace::from_path(&bed.namespace.path()).unwrap().id().to_string();
        let lines = bed.lines.all();
        for expected in [
            "web-host",
            "10.9.8.7 web-friend",
            "nameserver 127.0.0.11",
            network.as_str(),
            "/sys/class/net/tgmark",
        ] {
            assert!(
                lines.contains(&format!("web | {expected}")),
                "{expected} is missing: {lines:#?}"
            );
        }
        assert_eq!(lines.iter().filter(|line| *line == "web | web-host").count(), 2, "{lines:#?}");
        // The service, its init, and the pipeline that counts.
        let pids = lines.iter().find_map(|line| line.strip_prefix("web | pids ")).unwrap();
        assert!(pids.parse::<u32>().unwrap() <= 6, "{pids}");
        assert_eq!((host_files(), mounts(), hostname()), before);
        bed.supervisor.stop().await;
    });
    assert_eq!((host_files(), mounts(), hostname()), before);
    bed.assert_clean();
}

#[test]
fn a_service_has_the_given_environment_and_directory_and_no_other_descriptors() {
    let mut bed = Bed::new(FOREVER);
    let directory = tempfile::tempdir().unwrap();
    run(async {
        let mut spec = bed.shell(
            "web",
            "pwd; echo $COLOUR; env | grep -c CARGO; ls /proc/$$/fd | wc -l; readlink /proc/$$/fd/0",
        );
        spec.environment.insert("COLOUR".to_owned(), "teal".to_owned());
        spec.working_dir = directory.path().to_owned();
        bed.supervisor.start(vec![spec]).await.unwrap();
        assert!(bed.supervisor.wait().await.success());
    });
    let expected = [directory.path().to_str().unwrap(), "teal", "0", "3", "/dev/null"];
    let mut expected: Vec<String> = expected.iter().map(|line| format!("web | {line}")).collect();
    expected.push("web exited with code 0".to_owned());
    // Shells may use further descriptors, from 10 on.
    assert_eq!(bed.lines.all(), expected);
}

/// Root in a service can take descriptors of its init process (pidfd_getfd(2)).
#[test]
fn the_init_of_a_service_keeps_no_inherited_descriptor() {
    let mut bed = Bed::new(FOREVER);
    let leaked = tempfile::NamedTempFile::new().unwrap();
    // Inherited by every process that this one starts.
    rustix::io::fcntl_setfd(leaked.as_file(), rustix::io::FdFlags::empty()).unwrap();
    run(async {
        let spec = bed.shell("web", "ls -l /proc/1/fd");
        bed.supervisor.start(vec![spec]).await.unwrap();
        assert!(bed.supervisor.wait().await.success());
    });
    let lines = bed.lines.all();
    let path = leaked.path().to_str().unwrap();
    assert!(lines.iter().any(|line| line.contains("socket:")), "{lines:?}");
    assert!(!lines.iter().any(|line| line.contains(path)), "{lines:?}");
}

#[test]
fn lines_of_both_streams_are_prefixed_with_padded_names() {
    let mut bed = Bed::new(FOREVER);
    run(async {
        let web = bed.shell("web", "printf 'one\\ntwo\\033[2J\\nrest'; exit 3");
        let database = after(bed.shell("database", "echo to stderr >&2"), &["web"]);
        bed.supervisor.start(vec![web, database]).await.unwrap();
        let ended = bed.supervisor.wait().await;
        assert_eq!(
            ended.0,
            [("web".to_owned(), Exit::Code(3)), ("database".to_owned(), Exit::Code(0))]
        );
    });
    let lines = bed.lines.all();
    let of = |start: &str| {
        lines.iter().filter(|line| line.starts_with(start)).cloned().collect::<Vec<_>>()
    };
    assert_eq!(
        of("web"),
        ["web      | one", "web      | two", "web      | rest", "web exited with code 3"]
    );
    assert_eq!(of("database"), ["database | to stderr", "database exited with code 0"]);
    bed.assert_clean();
}
