//! Verdicts on constructed hosts. Each host is fully capable except for what the test changes.

use super::all;
use crate::doctor::host::*;
use crate::doctor::report::{Row, Verdict};
use rustix::io::Errno;
use tidegate_model::Protocol;
use tidegate_netsetup::{DockerUser, IptablesState, UserRule};

/// A host that supports everything, as seen by root.
fn good() -> Host {
    let full = Inside {
        network: Ok(()),
        nftables: Ok(true),
        gates: Ok(()),
        port_guards: Ok("BPF (tcx)".to_owned()),
        tun: Ok(TunOffload { tcp: true, udp: true }),
    };
    Host {
        release: "6.18.4".into(),
        capabilities: Capabilities { net_admin: true, net_bind_service: true, many_pipes: true },
        direct: Ok(Trial::Entered(full.clone())),
        in_user_namespace: Ok(Trial::Entered(full)),
        user_namespaces: UserNamespaces {
            max: Ok(Some(96365)),
            unprivileged_clone: Ok(None),
            apparmor_restricts: Ok(None),
        },
        tun_device: Ok(()),
        tun_mode: Some(0o666),
        sockets: Sockets {
            tcp_peek_offset: Ok(()),
            udp_gro: Ok(()),
            udp_segment: Ok(()),
            force_buffer: Ok(()),
            ipv6: Ok(()),
        },
        forwarding: Forwarding {
            v4: Ok(Some(0)),
            v6: Ok(Some(0)),
            v6_disabled: Ok(Some(0)),
            v6_per_interface: Ok(Some(0)),
        },
        iptables: Ok([None, None]),
        iptables_installed: true,
        mark_setters: Vec::new(),
        routes: Ok(vec![("203.0.113.0/24".parse().unwrap(), "eth0".into())]),
        first_rule: Ok(None),
        services: Ok(Vec::new()),
        limits: Limits {
            open_files: (Some(1024), Some(524_288)),
            pipe_bytes: Ok(Some(64 << 20)),
            receive_buffer: Ok(Some(212_992)),
            first_port: Ok(Some(1024)),
        },
        run_directory: RunDirectory { path: Some("/run/tidegate".into()), writable: Ok(()) },
    }
}

/// The same host as seen by an ordinary user.
fn ordinary() -> Host {
    let mut host = good();
    host.capabilities = Capabilities::default();
    host.direct = Ok(Trial::NotMade(Errno::PERM.into()));
    host.sockets.force_buffer = Err(Errno::PERM.into());
    host
}

#[track_caller]
fn row(check: &str, host: &Host) -> Row {
    all(host).into_iter().find(|row| row.check == check).unwrap()
}

/// The verdict and the text of `check`. From `limited` on, a fix is required.
#[track_caller]
fn judged(check: &str, host: &Host) -> (Verdict, String) {
    let row = row(check, host);
    if row.verdict >= Verdict::Limited {
        assert!(row.fix.is_some(), "{row:?}");
    }
    (row.verdict, row.found + row.fix.as_deref().unwrap_or_default())
}

#[track_caller]
fn expect(check: &str, host: &Host, verdict: Verdict, text: &str) {
    let (judged, text_found) = judged(check, host);
    assert_eq!(judged, verdict, "{check}: {text_found}");
    assert!(text_found.contains(text), "{check}: {text_found}");
}

#[test]
fn a_capable_host_has_no_findings() {
    for row in all(&good()) {
        let expected = if row.check == "firewall" { Verdict::Note } else { Verdict::Ok };
        assert_eq!((row.verdict, &row.fix), (expected, &None), "{row:?}");
    }
}

#[test]
fn check_names_are_unique() {
    let rows = all(&good());
    let names: std::collections::BTreeSet<_> = rows.iter().map(|row| row.check).collect();
    assert_eq!(names.len(), rows.len());
}

#[test]
fn old_kernels_are_missing_and_unknown_releases_cannot_be_told() {
    let release = |release: &str| Host { release: release.into(), ..good() };
    expect("kernel", &release("5.10.0"), Verdict::Ok, "5.10.0");
    expect("kernel", &release("5.9.16"), Verdict::Missing, "run Linux 5.10");
    expect("kernel", &release("generic"), Verdict::Note, "cannot tell");
}

#[test]
fn without_privileges_namespaces_need_a_user_namespace() {
    let mut host = ordinary();
    expect("network-namespaces", &host, Verdict::Limited, "run as root");
    expect("user-namespaces", &host, Verdict::Ok, "");
    expect("networks", &host, Verdict::Ok, "");
    expect("tun", &host, Verdict::Ok, "");
    host.in_user_namespace = Ok(Trial::NotMade(Errno::PERM.into()));
    expect("network-namespaces", &host, Verdict::Missing, "run as root");
    expect("user-namespaces", &host, Verdict::Limited, "seccomp");
    expect("networks", &host, Verdict::Note, "cannot tell");
    expect("tun", &host, Verdict::Note, "cannot tell");
    expect("tun-offload", &host, Verdict::Note, "cannot tell");
}

#[test]
fn each_error_of_a_network_namespace_has_its_own_fix() {
    let mut host = good();
    for (trial, fix) in [
        (Trial::NotMade(Errno::NOSPC.into()), "user.max_net_namespaces"),
        (Trial::NotMade(Errno::INVAL.into()), "CONFIG_NET_NS"),
        (Trial::NoReturn(Errno::PERM.into()), "unshare --user"),
    ] {
        host.direct = Ok(trial);
        expect("network-namespaces", &host, Verdict::Limited, fix);
    }
    let mut host = good();
    host.capabilities.net_admin = false;
    expect("network-namespaces", &host, Verdict::Limited, "CAP_NET_ADMIN");
    host.direct = Err("cannot start a process: no such file".into());
    expect("network-namespaces", &host, Verdict::Note, "cannot tell: cannot start a process");
}

#[test]
fn the_setting_that_forbids_user_namespaces_is_named() {
    let refused = Ok(Trial::NotMade(Errno::PERM.into()));
    let with = |change: &dyn Fn(&mut UserNamespaces)| {
        let mut host = ordinary();
        host.in_user_namespace = refused.clone();
        change(&mut host.user_namespaces);
        host
    };
    for (host, fix) in [
        (with(&|one| one.max = Ok(Some(0))), "sysctl -w user.max_user_namespaces=10000"),
        (
            with(&|one| one.unprivileged_clone = Ok(Some(0))),
            "sysctl -w kernel.unprivileged_userns_clone=1",
        ),
        (
            with(&|one| one.apparmor_restricts = Ok(Some(1))),
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    ] {
        expect("user-namespaces", &host, Verdict::Limited, fix);
        let as_root = Host { direct: good().direct, ..host };
        expect("user-namespaces", &as_root, Verdict::Note, fix);
        let root_may = Host { in_user_namespace: good().in_user_namespace, ..as_root };
        expect("user-namespaces", &root_may, Verdict::Note, "not to ordinary users");
    }
}

#[test]
fn a_user_namespace_without_capabilities_does_not_count() {
    let mut host = ordinary();
    host.in_user_namespace = Ok(Trial::Entered(Inside {
        network: Err(("add bridge \"tg-trial\"".into(), Errno::PERM.into())),
        nftables: Err(Errno::PERM.into()),
        gates: Err(Errno::PERM.into()),
        port_guards: Ok("nftables (netdev)".to_owned()),
        tun: Err(Errno::PERM.into()),
    }));
    host.user_namespaces.apparmor_restricts = Ok(Some(1));
    expect(
        "user-namespaces",
        &host,
        Verdict::Limited,
        "created, but without capabilities: Operation not permitted",
    );
    expect("user-namespaces", &host, Verdict::Limited, "apparmor_restrict_unprivileged_userns=0");
    expect("network-namespaces", &host, Verdict::Missing, "run as root");
    expect("networks", &host, Verdict::Note, "cannot tell");
}

#[test]
fn a_failed_network_is_reported_with_its_step() {
    let failed = |errno: Errno| {
        Ok(Trial::Entered(Inside {
            network: Err(("add bridge \"tg-trial\"".into(), errno.into())),
            nftables: Ok(true),
            gates: Ok(()),
            port_guards: Ok("BPF (tcx)".to_owned()),
            tun: Ok(TunOffload { tcp: true, udp: true }),
        }))
    };
    let root = |errno| Host { direct: failed(errno), ..good() };
    expect("networks", &root(Errno::OPNOTSUPP), Verdict::Missing, "modprobe -a bridge veth");
    expect(
        "networks",
        &root(Errno::OPNOTSUPP),
        Verdict::Missing,
        "add bridge \"tg-trial\": Operation not supported",
    );
    expect("networks", &root(Errno::ROFS), Verdict::Missing, "remount,rw /proc/sys");
    let user = Host { in_user_namespace: failed(Errno::ROFS), ..ordinary() };
    expect("networks", &user, Verdict::Limited, "remount,rw /proc/sys");
}

#[test]
fn a_missing_or_inaccessible_tun_device_is_limited() {
    let with =
        |errno: Errno, mode| Host { tun_device: Err(errno.into()), tun_mode: mode, ..good() };
    expect("tun", &with(Errno::NOENT, None), Verdict::Limited, "modprobe tun");
    expect("tun", &with(Errno::ACCESS, Some(0o600)), Verdict::Limited, "(mode 0600)");
    expect("tun", &with(Errno::PERM, Some(0o666)), Verdict::Limited, "--device /dev/net/tun");
    expect("tun", &with(Errno::NODEV, Some(0o666)), Verdict::Limited, "modprobe tun");
    let made = |tun| Host {
        direct: Ok(Trial::Entered(Inside {
            network: Ok(()),
            nftables: Ok(true),
            gates: Ok(()),
            port_guards: Ok("BPF (tcx)".to_owned()),
            tun,
        })),
        ..good()
    };
    let refused = made(Err(Errno::PERM.into()));
    expect("tun", &refused, Verdict::Limited, "no device could be created");
    expect("tun-offload", &refused, Verdict::Note, "cannot tell");
    let offload = |tcp, udp| made(Ok(TunOffload { tcp, udp }));
    expect("tun-offload", &offload(true, false), Verdict::Limited, "run Linux 6.2");
    expect("tun-offload", &offload(false, false), Verdict::Limited, "packet by packet");
}

#[test]
fn unsupported_socket_options_are_named() {
    let refused = Err(Errno::OPNOTSUPP.into());
    let mut host = good();
    host.sockets.tcp_peek_offset = refused;
    expect("tcp-peek-offset", &host, Verdict::Limited, "run Linux 6.9");
    host.sockets.udp_segment = refused;
    expect("udp-offload", &host, Verdict::Limited, "UDP_SEGMENT: Operation not supported");
    host.sockets.ipv6 = Err(Errno::AFNOSUPPORT.into());
    expect("ipv6", &host, Verdict::Limited, "ipv6.disable=1");
    let mut host = good();
    host.forwarding.v6_disabled = Ok(Some(1));
    expect("ipv6", &host, Verdict::Limited, "sysctl -w net.ipv6.conf.all.disable_ipv6=0");
}

#[test]
fn forwarding_is_a_note_with_the_settings_in_effect() {
    let mut host = good();
    host.forwarding.v4 = Ok(Some(1));
    expect("ip-forward", &host, Verdict::Note, "on (IPv4): only guards (ip rule, priority 7657)");
    expect("ip-forward", &host, Verdict::Note, "sysctl -w net.ipv4.ip_forward=0");
    host.forwarding.v6 = Ok(Some(1));
    expect(
        "ip-forward",
        &host,
        Verdict::Note,
        "net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0",
    );
    // A kernel without IPv6 does not forward IPv6.
    host.forwarding = Forwarding { v4: Ok(Some(0)), v6: Ok(None), ..host.forwarding };
    expect("ip-forward", &host, Verdict::Ok, "off");
    host.forwarding.v4 = Err("/proc/sys/net/ipv4/ip_forward: No such file or directory".into());
    expect("ip-forward", &host, Verdict::Note, "cannot tell: /proc/sys");
    host.forwarding.v6_per_interface = Ok(None);
    expect("ipv6-force-forwarding", &host, Verdict::Note, "run Linux 6.17");
}

#[test]
fn preceding_policy_rules_are_reported() {
    let host = |first_rule| Host { first_rule, ..good() };
    expect("policy-rules", &host(Ok(Some(5))), Verdict::Ok, "");
    expect("policy-rules", &host(Ok(Some(4))), Verdict::Limited, "a rule with priority 4 leaves");
    expect("policy-rules", &host(Ok(Some(0))), Verdict::Limited, "a priority of 5 or higher");
    expect(
        "policy-rules",
        &host(Err("no netlink".into())),
        Verdict::Note,
        "cannot tell: no netlink",
    );
}

#[test]
fn routes_in_the_address_pools_are_skipped_until_no_subnet_is_free() {
    let with = |routes: &[(&str, &str)]| {
        let routes = routes.iter().map(|(net, link)| (net.parse().unwrap(), (*link).to_owned()));
        Host { routes: Ok(routes.collect()), ..good() }
    };
    let host =
        with(&[("172.28.0.0/24", "br-x"), ("10.0.0.0/8", "tun0"), ("172.28.0.0/24", "br-x")]);
    expect("address-pools", &host, Verdict::Note, "the next network gets 172.28.1.0/24");
    assert_eq!(
        row("address-pools", &host).details,
        ["10.0.0.0/8 via tun0", "172.28.0.0/24 via br-x"]
    );
    let own = with(&[("172.28.0.0/24", "tg-front-0000")]);
    expect("address-pools", &own, Verdict::Ok, "");
    let full = with(&[("172.16.0.0/12", "br-x"), ("10.0.0.0/8", "tun0")]);
    expect("address-pools", &full, Verdict::Limited, "ipam.config.subnet");
}

#[test]
fn services_on_all_addresses_are_listed_with_their_processes() {
    let service = |port, holder: Option<&str>| Service {
        port,
        protocol: Protocol::Tcp,
        holder: holder.map(str::to_owned),
    };
    let host = Host {
        services: Ok(vec![service(22, Some("sshd (pid 1)")), service(111, None)]),
        ..good()
    };
    expect("host-services", &host, Verdict::Note, "2 sockets are bound to all addresses");
    let details = row("host-services", &host).details;
    assert_eq!(details, ["22/tcp: sshd (pid 1)", "111/tcp: process not visible to this user"]);
    let many = Host { services: Ok((1..=100).map(|port| service(port, None)).collect()), ..good() };
    let details = row("host-services", &many).details;
    assert_eq!((details.len(), details[30].as_str()), (31, "and 70 more"));
}

#[test]
fn limits_apply_to_ordinary_users() {
    let mut host = ordinary();
    expect("low-ports", &host, Verdict::Limited, "below 1024");
    expect("pipe-memory", &host, Verdict::Ok, "64 concurrent connections");
    expect("receive-buffer", &host, Verdict::Limited, "sysctl -w net.core.rmem_max=4194304");
    expect("open-files", &host, Verdict::Ok, "soft 1024, hard 524288");
    host.limits = Limits {
        open_files: (Some(1024), Some(1024)),
        pipe_bytes: Ok(Some(4 << 20)),
        receive_buffer: Ok(Some(4 << 20)),
        first_port: Ok(Some(0)),
    };
    expect("low-ports", &host, Verdict::Ok, "from 0");
    expect("pipe-memory", &host, Verdict::Limited, "fs.pipe-user-pages-soft");
    expect("receive-buffer", &host, Verdict::Ok, "4194304");
    expect("open-files", &host, Verdict::Limited, "512 concurrent connections");
    // The first three do not apply to root.
    let root = Host { limits: host.limits, ..good() };
    for check in ["low-ports", "pipe-memory", "receive-buffer"] {
        expect(check, &root, Verdict::Ok, "");
    }
}

#[test]
fn a_run_directory_is_required() {
    let with = |path: Option<&str>, writable| Host {
        run_directory: RunDirectory { path: path.map(Into::into), writable },
        ..good()
    };
    expect(
        "run-directory",
        &with(None, Err(Errno::NOENT.into())),
        Verdict::Missing,
        "XDG_RUNTIME_DIR",
    );
    let closed = with(Some("/run/tidegate"), Err(Errno::ACCESS.into()));
    expect(
        "run-directory",
        &closed,
        Verdict::Missing,
        "/run/tidegate is not writable: Permission denied",
    );
}

#[test]
fn without_gates_their_replacement_is_reported() {
    let with = |errno: Errno| Host {
        direct: Ok(Trial::Entered(Inside {
            network: Ok(()),
            nftables: Ok(true),
            gates: Err(errno.into()),
            port_guards: Ok("nftables (netdev)".to_owned()),
            tun: Ok(TunOffload { tcp: true, udp: true }),
        })),
        ..good()
    };
    expect("gates", &good(), Verdict::Ok, "keep networks closed");
    expect("gates", &with(Errno::PERM), Verdict::Note, "with CAP_BPF");
    expect("gates", &with(Errno::INVAL), Verdict::Note, "Linux 6.6");
}

fn with_nftables(nftables: Result<bool, Errno>) -> Host {
    let nftables = nftables.map_err(Into::into);
    let inside = Inside {
        network: Ok(()),
        nftables,
        gates: Ok(()),
        port_guards: Ok("BPF (tcx)".to_owned()),
        tun: Ok(TunOffload { tcp: true, udp: true }),
    };
    Host { direct: Ok(Trial::Entered(inside)), ..good() }
}

#[test]
fn the_chosen_firewall_is_reported_with_the_reason() {
    let docker = |rules: &[&str]| {
        let rules: Vec<_> =
            rules.iter().map(|text| UserRule { text: (*text).to_owned() }).collect();
        let state = IptablesState {
            version: "iptables v1.8.9 (legacy)".into(),
            forward_drops: rules.is_empty(),
            docker_user: DockerUser { rules, forward: true, ..DockerUser::default() },
        };
        Host { iptables: Ok([Some(state), None]), ..good() }
    };
    expect("firewall", &good(), Verdict::Note, "uses nftables: it is available");
    expect("firewall", &docker(&[]), Verdict::Note, "uses iptables: the chain FORWARD");
    expect("iptables", &docker(&[]), Verdict::Note, "iptables v1.8.9 (legacy)");
    let rules = docker(&[
        "-A DOCKER-USER -s 192.0.2.0/24 -j DROP",
        "-A DOCKER-USER -p tcp --dport 80 -j DROP",
    ]);
    expect("firewall", &rules, Verdict::Note, "uses iptables: the chain DOCKER-USER has rules");
    let marks = Host { mark_setters: vec!["ip nat POSTROUTING".to_owned()], ..docker(&[]) };
    assert!(
        row("iptables", &marks)
            .details
            .iter()
            .any(|line| line.starts_with("ip nat POSTROUTING may"))
    );
    let details = row("iptables", &rules).details;
    assert!(details[0].ends_with("-j DROP (applies to published ports)"), "{details:?}");
    assert!(details[1].ends_with("ports are published by the kernel)"), "{details:?}");

    let host = with_nftables(Err(Errno::PROTONOSUPPORT));
    expect("nftables", &host, Verdict::Note, "not in this kernel");
    expect("firewall", &host, Verdict::Note, "uses iptables: no nftables");
    let host = Host { iptables_installed: false, ..host };
    expect("firewall", &host, Verdict::Limited, "the NAT engine provides egress");
    expect("iptables", &host, Verdict::Note, "not installed");
    expect("nftables", &with_nftables(Ok(false)), Verdict::Note, "Linux 6.9");
    expect("firewall", &ordinary(), Verdict::Note, "none: networks of an ordinary user");
}

#[test]
fn without_port_guards_the_lost_guarantees_are_listed() {
    let with = |errno: Errno| {
        let Ok(Trial::Entered(inside)) = good().direct else { panic!("not entered") };
        let failed = |mechanism: &str| (mechanism.to_owned(), errno.into());
        let port_guards = Err(vec![failed("BPF (tcx)"), failed("nftables (netdev)")]);
        Host { direct: Ok(Trial::Entered(Inside { port_guards, ..inside })), ..good() }
    };
    expect("port-guards", &good(), Verdict::Ok, "only from its own addresses");
    expect("port-guards", &with(Errno::PERM), Verdict::Limited, "with CAP_BPF");
    expect("port-guards", &with(Errno::OPNOTSUPP), Verdict::Limited, "CONFIG_NF_TABLES_NETDEV");
    let rows = all(&with(Errno::PERM));
    let row = rows.iter().find(|row| row.check == "port-guards").unwrap();
    assert!(
        row.details.iter().any(|detail| detail.contains("of their gateway")),
        "{:?}",
        row.details
    );
}
