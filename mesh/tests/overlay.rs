//! Two and three hosts as namespaces, each with the bridge and the VXLAN device of a network.

mod common;

use common::{Hosts, mac, reaches, vtep};
use std::net::IpAddr;
use std::time::{Duration, Instant};
use tidegate_mesh::device::{Device, DeviceSpec, Links, overhead};
use tidegate_mesh::overlay::Entries;
use tidegate_model::MacAddress;

fn entries(endpoints: &[(u8, IpAddr)]) -> Entries {
    let mut entries = Entries::default();
    for (id, vtep) in endpoints {
        entries.stations.insert(mac(*id), *vtep);
        for address in [format!("10.9.0.{id}"), format!("fd09::{id}")] {
            entries.neighbours.insert(address.parse().unwrap(), mac(*id));
        }
    }
    entries
}

fn spec(number: usize, vni: u32, v6: bool) -> DeviceSpec {
    let vtep = vtep(number, v6);
    DeviceSpec {
        name: format!("vx{vni}"),
        bridge: "front".into(),
        vni,
        mtu: 1500 - overhead(&vtep),
        vtep,
    }
}

/// The links of host `number`. Their socket stays open for the devices.
fn links(hosts: &Hosts, number: usize) -> std::mem::ManuallyDrop<Links> {
    let namespace = tidegate_netns::Namespace::from_path(&hosts.hosts[number].path()).unwrap();
    std::mem::ManuallyDrop::new(Links::open(&namespace).unwrap())
}

async fn create(hosts: &Hosts, number: usize, vni: u32, v6: bool) -> Device {
    links(hosts, number).ensure(&spec(number, vni, v6), |_| Ok(())).await.unwrap()
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(test);
}

#[test]
fn containers_on_two_hosts_reach_each_other_over_either_family() {
    run(async {
        for v6 in [false, true] {
            let hosts = Hosts::new(2);
            let (a, b) = (hosts.container(0, 7), hosts.container(1, 8));
            let devices = [create(&hosts, 0, 4097, v6).await, create(&hosts, 1, 4097, v6).await];
            assert!(!reaches(&a, "10.9.0.8"), "without entries");
            devices[0].reconcile(&entries(&[(8, vtep(1, v6))])).await.unwrap();
            devices[1].reconcile(&entries(&[(7, vtep(0, v6))])).await.unwrap();
            assert!(reaches(&a, "10.9.0.8") && reaches(&b, "fd09::7"), "VTEP over IPv6: {v6}");
            // The largest packet that fits, and one that is larger by a byte.
            let largest = 1500 - overhead(&vtep(0, v6)) - 28;
            let ping = |size: u32| {
                let size = size.to_string();
                let args = ["-c", "1", "-W", "1", "-M", "do", "-s", &size, "10.9.0.8"];
                a.ip(&["link", "set", "eth0", "mtu", "1500"]);
                a.command("ping").args(args).output().unwrap().status.success()
            };
            assert!(ping(largest), "{largest}");
            assert!(!ping(largest + 1), "{largest}");
        }
    });
}

/// Whatever other software or a killed process has left.
#[test]
fn entries_are_reconciled_from_any_state_of_the_kernel() {
    run(async {
        let hosts = Hosts::new(1);
        let device = create(&hosts, 0, 4097, false).await;
        let desired = entries(&[(7, vtep(1, false)), (8, vtep(2, false))]);
        assert_eq!(device.reconcile(&desired).await.unwrap(), 6);
        assert_eq!(device.entries().await.unwrap(), desired);
        assert_eq!(device.reconcile(&desired).await.unwrap(), 0);
        hosts.hosts[0].ip(&["neigh", "del", "10.9.0.7", "dev", "front"]);
        hosts.hosts[0].ip(&[
            "neigh",
            "add",
            "10.9.0.99",
            "lladdr",
            "02:00:00:00:00:99",
            "dev",
            "front",
        ]);
        let bridge = |args: &[&str]| {
            let output = hosts.hosts[0].command("bridge").args(args).output().unwrap();
            assert!(output.status.success(), "{output:?}");
        };
        let (seven, eight) = (mac(7).to_string(), mac(8).to_string());
        // Half of a pair is missing, another VTEP, and entries of nobody.
        bridge(&["fdb", "del", &seven, "dev", "vx4097", "master"]);
        bridge(&["fdb", "replace", &eight, "dev", "vx4097", "dst", "192.0.2.99", "self"]);
        bridge(&["fdb", "add", "02:00:00:00:00:aa", "dev", "vx4097", "dst", "192.0.2.9", "self"]);
        bridge(&["fdb", "add", "02:00:00:00:00:bb", "dev", "vx4097", "master", "static"]);
        assert!(device.reconcile(&desired).await.unwrap() > 0);
        assert_eq!(device.entries().await.unwrap(), desired);
        assert_eq!(device.reconcile(&Entries::default()).await.unwrap(), 6);
        assert_eq!(device.entries().await.unwrap(), Entries::default());
    });
}

#[test]
fn networks_with_the_same_addresses_are_isolated_by_their_vni() {
    run(async {
        let hosts = Hosts::new(2);
        let (a, b) = (hosts.container(0, 7), hosts.container(1, 8));
        let devices = [create(&hosts, 0, 4097, false).await, create(&hosts, 1, 4098, false).await];
        devices[0].reconcile(&entries(&[(8, vtep(1, false))])).await.unwrap();
        devices[1].reconcile(&entries(&[(7, vtep(0, false))])).await.unwrap();
        assert!(!reaches(&a, "10.9.0.8") && !reaches(&b, "10.9.0.7"));
    });
}

/// Prints the time for 1,000 endpoints of other hosts, 4,000 entries.
#[test]
fn a_thousand_endpoints_are_programmed() {
    run(async {
        let hosts = Hosts::new(1);
        let device = create(&hosts, 0, 4097, false).await;
        let mut desired = Entries::default();
        for number in 0..1000_u16 {
            let [high, low] = number.to_be_bytes();
            let mac = MacAddress([2, 0, 10, 9, high, low]);
            desired.stations.insert(mac, vtep(1, false));
            desired.neighbours.insert([10, 9, high, low].into(), mac);
        }
        let begun = Instant::now();
        assert_eq!(device.reconcile(&desired).await.unwrap(), 2000);
        println!("1,000 endpoints programmed in {:?}", begun.elapsed());
        assert!(begun.elapsed() < Duration::from_secs(10));
        assert!(device.entries().await.unwrap() == desired);
    });
}

#[test]
fn a_device_that_cannot_be_created_leaves_nothing() {
    run(async {
        let hosts = Hosts::new(1);
        let links = links(&hosts, 0);
        let absent = DeviceSpec { bridge: "absent".into(), ..spec(0, 4097, false) };
        links.ensure(&absent, |_| Ok(())).await.unwrap_err();
        let denied = |_| Err(std::io::ErrorKind::PermissionDenied.into());
        links.ensure(&spec(0, 4098, false), denied).await.unwrap_err();
        let _first = create(&hosts, 0, 4097, false).await;
        let second = DeviceSpec { name: "vy".into(), ..spec(0, 4097, false) };
        let error = links.ensure(&second, |_| Ok(())).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists, "the VNI is in use");
        hosts.hosts[0].ip(&["link", "add", "vz", "type", "bridge"]);
        let foreign = DeviceSpec { name: "vz".into(), ..spec(0, 4099, false) };
        let error = links.ensure(&foreign, |_| Ok(())).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists, "a link of other software");
        let links = hosts.hosts[0].ip(&["-o", "link", "show", "type", "vxlan"]);
        assert_eq!(links.lines().count(), 1, "{links}");
    });
}

/// After a restart, devices with the same parameters carry traffic without interruption.
#[test]
fn devices_of_a_previous_process_are_kept_replaced_or_removed() {
    run(async {
        let hosts = Hosts::new(1);
        let device = create(&hosts, 0, 4097, false).await;
        let desired = entries(&[(7, vtep(1, false))]);
        device.reconcile(&desired).await.unwrap();
        let again = create(&hosts, 0, 4097, false).await;
        assert_eq!(again.index(), device.index());
        assert_eq!(again.entries().await.unwrap(), desired);
        let links = links(&hosts, 0);
        let smaller = DeviceSpec { mtu: 1300, ..spec(0, 4097, false) };
        let replaced = links.ensure(&smaller, |_| Ok(())).await.unwrap();
        assert_ne!(replaced.index(), device.index());
        assert_eq!(links.sweep(&["vx4097".to_owned()].into()).await.unwrap(), [""; 0]);
        hosts.hosts[0].ip_all("link add other type vxlan id 9 dstport 4789 dev eth0");
        assert_eq!(links.sweep(&[].into()).await.unwrap(), ["vx4097"]);
        let left = hosts.hosts[0].ip(&["-o", "link", "show", "type", "vxlan"]);
        assert!(left.lines().count() == 1 && left.contains("other"), "{left}");
    });
}
