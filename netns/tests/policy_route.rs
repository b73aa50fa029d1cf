//! Ownership and cleanup of rules, routes and sysctls, for each kind of exit of their owner.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tidegate_model::Protocol;
use tidegate_model::registry::{MARK, OwnerSlot};
use tidegate_netns::{
    Families, Family, MAX_SELECTORS, Namespace, PolicyRoute, PolicyRouteError, Selector, Sysctl,
    sweep_in,
};
use tidegate_testbed::{Process, Signal, addr};

const SYSCTLS: [&str; 3] =
    ["net.ipv4.tcp_fwmark_accept", "net.ipv4.fwmark_reflect", "net.ipv6.fwmark_reflect"];

const SOON: Duration = Duration::from_secs(10);

/// A namespace with its own journal and a snapshot of its initial state.
struct Scene {
    inside: tidegate_testbed::Namespace,
    namespace: Namespace,
    journal: TempDir,
    initial: String,
}

impl Scene {
    fn new() -> Self {
        let inside = tidegate_testbed::Namespace::new();
        let namespace = Namespace::from_path(&inside.path()).unwrap();
        let initial = snapshot(&inside);
        Self { inside, namespace, journal: tempfile::tempdir().unwrap(), initial }
    }

    fn install(&self) -> Arc<PolicyRoute> {
        self.try_install(Families::Both, "1").unwrap()
    }

    fn try_install(
        &self,
        families: Families,
        value: &str,
    ) -> Result<Arc<PolicyRoute>, PolicyRouteError> {
        let sysctls = SYSCTLS.map(|name| Sysctl::new(name, value));
        PolicyRoute::install_in(self.journal.path(), &self.namespace, families, &sysctls)
            .map(Arc::new)
    }

    fn rules(&self) -> String {
        rules(&self.inside)
    }

    fn sysctls(&self) -> [String; 3] {
        SYSCTLS.map(|name| self.inside.read_sysctl(name))
    }

    fn journals(&self) -> usize {
        fs::read_dir(self.journal.path()).unwrap().count()
    }

    /// Starts an owner in a separate process; see [`owner_in_another_process`].
    fn start_owner_process(&self) -> Process {
        let owner = Process::spawn(
            Command::new(env::current_exe().unwrap())
                .args(["--exact", "owner_in_another_process", "--nocapture"])
                .env(OWNER_NAMESPACE, self.inside.path())
                .env(OWNER_JOURNAL, self.journal.path()),
        );
        owner.wait_for_line("installed", SOON);
        owner
    }

    fn kill(mut owner: Process) {
        owner.stop(Signal::KILL, SOON);
    }

    #[track_caller]
    fn assert_initial_state(&self) {
        assert_eq!(snapshot(&self.inside), self.initial);
        assert_eq!(self.journals(), 0, "the journal is empty");
    }
}

fn rules(namespace: &tidegate_testbed::Namespace) -> String {
    namespace.ip(&["rule"]) + &namespace.ip(&["-6", "rule"])
}

/// Rules, routes of all tables and sysctls as text.
fn snapshot(namespace: &tidegate_testbed::Namespace) -> String {
    let routes =
        ["-4", "-6"].map(|family| namespace.ip(&[family, "route", "show", "table", "all"]));
    let sysctls = SYSCTLS.map(|name| format!("{name} = {}\n", namespace.read_sysctl(name)));
    rules(namespace) + &routes.concat() + &sysctls.concat()
}

fn marked(family: Family) -> Selector {
    Selector::marked(family, MARK)
}

fn udp_reply(port: u16) -> Selector {
    Selector {
        to: Some(addr::CLIENT_V4.into()),
        protocol: Some(Protocol::Udp),
        source_port: Some(port),
        ..Selector::new(Family::V4)
    }
}

const OWNER_NAMESPACE: &str = "TIDEGATE_TEST_OWNER_NAMESPACE";
const OWNER_JOURNAL: &str = "TIDEGATE_TEST_OWNER_JOURNAL";

/// The body of the process that [`Scene::start_owner_process`] starts, not a test. It holds a
/// policy route until it is killed, and does nothing in a normal test run.
#[test]
fn owner_in_another_process() {
    let (Some(namespace), Some(journal)) =
        (env::var_os(OWNER_NAMESPACE), env::var_os(OWNER_JOURNAL))
    else {
        return;
    };
    let namespace = Namespace::from_path(Path::new(&namespace)).unwrap();
    let sysctls = SYSCTLS.map(|name| Sysctl::new(name, "1"));
    let route = PolicyRoute::install_in(Path::new(&journal), &namespace, Families::Both, &sysctls)
        .map(Arc::new)
        .unwrap();
    let _guards = Family::ALL.map(|family| route.steer(marked(family)).unwrap());
    println!("installed in slot {}", route.slot().0);
    std::thread::sleep(Duration::from_secs(3600));
}

#[test]
fn drop_reverts_the_installation() {
    let scene = Scene::new();
    let route = scene.install();
    assert_eq!(route.slot(), OwnerSlot(0));
    assert_eq!(scene.sysctls(), ["1", "1", "1"]);
    assert_eq!(
        scene.inside.ip(&["route", "show", "table", "29700"]).trim(),
        "local default dev lo proto 116 scope host"
    );
    assert!(
        scene
            .inside
            .ip(&["-6", "route", "show", "table", "29700"])
            .starts_with("local default dev lo proto 116")
    );
    let guards = Family::ALL.map(|family| route.steer(marked(family)).unwrap());
    let line = "7400:\tfrom all fwmark 0x74670001 lookup 29700 proto 116\n";
    assert_eq!(scene.rules().matches(line).count(), 2, "{}", scene.rules());
    drop(guards);
    assert!(!scene.rules().contains("29700"));
    drop(route);
    scene.assert_initial_state();
}

#[test]
fn guard_keeps_the_policy_route_alive() {
    let scene = Scene::new();
    let guard = scene.install().steer(marked(Family::V4)).unwrap();
    assert!(scene.rules().contains("lookup 29700"));
    drop(guard);
    scene.assert_initial_state();
}

#[test]
fn single_family_leaves_the_other_untouched() {
    let scene = Scene::new();
    let route = scene.try_install(Families::V6, "1").unwrap();
    assert_eq!(
        scene.inside.ip(&["-4", "route", "show", "table", "all"]).matches("29700").count(),
        0
    );
    let error = route.steer(marked(Family::V4)).unwrap_err();
    assert!(
        error.to_string().ends_with("the policy route was not installed for this family"),
        "{error}"
    );
    drop(route);
    scene.assert_initial_state();
}

#[test]
fn two_owners_do_not_conflict() {
    let scene = Scene::new();
    let (first, second) = (scene.install(), scene.install());
    assert_ne!(first.slot(), second.slot());
    let guards = [first.steer(udp_reply(53)).unwrap(), second.steer(udp_reply(53)).unwrap()];
    let [of_first, of_second] = guards;
    drop((of_first, first));
    assert!(!scene.rules().contains("lookup 29700"));
    assert!(
        scene.rules().contains("to 203.0.113.9 ipproto udp sport 53 lookup 29701"),
        "{}",
        scene.rules()
    );
    assert!(scene.inside.ip(&["route", "show", "table", "29701"]).contains("local default"));
    assert_eq!(scene.sysctls(), ["1", "1", "1"], "the second owner needs them");
    drop((of_second, second));
    scene.assert_initial_state();
}

#[test]
fn next_owner_cleans_up_after_a_killed_owner() {
    let scene = Scene::new();
    let owner = scene.start_owner_process();
    assert!(scene.rules().contains("lookup 29700"));
    Scene::kill(owner);
    assert!(scene.rules().contains("lookup 29700"), "not cleaned up yet");
    let next = scene.install();
    assert_eq!(next.slot(), OwnerSlot(0), "the slot is free again");
    assert!(!scene.rules().contains("lookup 29700"));
    drop(next);
    scene.assert_initial_state();
}

#[test]
fn sweep_cleans_up_after_a_killed_owner() {
    let scene = Scene::new();
    let (killed, living) = (scene.start_owner_process(), scene.start_owner_process());
    assert_eq!(sweep_in(scene.journal.path()).unwrap(), 0, "both live");
    Scene::kill(killed);
    assert_eq!(sweep_in(scene.journal.path()).unwrap(), 1);
    assert!(!scene.rules().contains("lookup 29700") && scene.rules().contains("lookup 29701"));
    assert_eq!(scene.sysctls(), ["1", "1", "1"], "one owner is alive");
    Scene::kill(living);
    assert_eq!(sweep_in(scene.journal.path()).unwrap(), 1);
    scene.assert_initial_state();
}

#[test]
fn sweep_finds_a_namespace_through_a_process() {
    let scene = Scene::new();
    Scene::kill(scene.start_owner_process());
    let journal = fs::read_dir(scene.journal.path()).unwrap().next().unwrap().unwrap().path();
    let written = fs::read_to_string(&journal).unwrap();
    let path = scene.inside.path();
    fs::write(&journal, written.replace(path.to_str().unwrap(), "/run/netns/gone")).unwrap();
    let _process = Process::spawn(scene.inside.command("sleep").arg("60"));
    assert_eq!(sweep_in(scene.journal.path()).unwrap(), 1);
    scene.assert_initial_state();
}

#[test]
fn record_of_a_deleted_namespace_is_deleted() {
    let scene = Scene::new();
    Scene::kill(scene.start_owner_process());
    assert_eq!(scene.journals(), 1);
    let Scene { inside, namespace, journal, .. } = scene;
    drop((inside, namespace));
    assert_eq!(sweep_in(journal.path()).unwrap(), 0);
    assert_eq!(fs::read_dir(journal.path()).unwrap().count(), 0);
}

#[test]
fn new_namespace_with_a_reused_inode_is_left_alone() {
    let scene = Scene::new();
    Scene::kill(scene.start_owner_process());
    // Same inode number, different cookie, as in a new namespace.
    let journal = fs::read_dir(scene.journal.path()).unwrap().next().unwrap().unwrap().path();
    let written: serde_json::Value = serde_json::from_slice(&fs::read(&journal).unwrap()).unwrap();
    let cookie = written["identity"]["cookie"].as_u64().expect("Linux 5.14 or later has cookies");
    let text = written.to_string().replace(&format!("\"cookie\":{cookie}"), "\"cookie\":1");
    fs::write(&journal, text).unwrap();
    let left = snapshot(&scene.inside);
    assert_eq!(sweep_in(scene.journal.path()).unwrap(), 0);
    assert_eq!(snapshot(&scene.inside), left);
}

#[test]
fn without_cookies_the_route_of_an_owner_identifies_the_namespace() {
    let scene = Scene::new();
    Scene::kill(scene.start_owner_process());
    let journal = fs::read_dir(scene.journal.path()).unwrap().next().unwrap().unwrap().path();
    let mut written: serde_json::Value =
        serde_json::from_slice(&fs::read(&journal).unwrap()).unwrap();
    written["identity"]["cookie"] = serde_json::Value::Null;
    fs::write(&journal, written.to_string()).unwrap();
    assert_eq!(sweep_in(scene.journal.path()).unwrap(), 1);
    scene.assert_initial_state();

    // The same record, but a namespace without that owner's route: a different namespace.
    scene.inside.sysctl(SYSCTLS[0], "1");
    fs::write(&journal, written.to_string()).unwrap();
    assert_eq!(sweep_in(scene.journal.path()).unwrap(), 0);
    assert_eq!(scene.inside.read_sysctl(SYSCTLS[0]), "1");
}

#[test]
fn foreign_rules_and_routes_are_preserved() {
    let scene = Scene::new();
    // A foreign rule at the priority of slot 0, a rule at the priority of slot 1 that differs from
    // tidegate's only in the protocol, and a table in use.
    scene.inside.ip_all(
        "rule add priority 7400 fwmark 0x74670001 lookup 99
         rule add priority 7401 fwmark 0x74670001 lookup 29701
         route add local default dev lo table 29702",
    );
    let before = snapshot(&scene.inside);
    let route = scene.install();
    assert_eq!(route.slot(), OwnerSlot(3));
    drop(route);
    assert_eq!(snapshot(&scene.inside), before);

    // Added after the slot was claimed.
    let route = scene.install();
    let _guard = route.steer(marked(Family::V4)).unwrap();
    scene.inside.ip_all("rule add priority 7403 fwmark 0x74670001 lookup 29703");
    drop((_guard, route));
    scene.inside.ip_all("rule del priority 7403");
    assert_eq!(snapshot(&scene.inside), before);
}

#[test]
fn externally_changed_sysctl_is_not_restored() {
    let scene = Scene::new();
    scene.inside.sysctl(SYSCTLS[1], "1");
    let route = scene.install();
    scene.inside.sysctl(SYSCTLS[0], "0");
    drop(route);
    assert_eq!(scene.sysctls(), ["0", "1", "0"], "external value, original value, original value");
}

#[test]
fn conflicting_sysctl_values_are_an_error() {
    let scene = Scene::new();
    let first = scene.install();
    let error = scene.try_install(Families::V4, "0").unwrap_err();
    let expected = format!(
        "policy route in namespace {}: sysctl {} is held at 1 by process {}",
        scene.namespace.id(),
        SYSCTLS[0],
        std::process::id()
    );
    assert_eq!(error.to_string(), expected);
    drop(first);
    scene.assert_initial_state();
}

#[test]
fn failed_installation_leaves_nothing() {
    let scene = Scene::new();
    let sysctls = [Sysctl::new(SYSCTLS[0], "1"), Sysctl::new("net.ipv4.no_such_thing", "1")];
    let installed =
        PolicyRoute::install_in(scene.journal.path(), &scene.namespace, Families::Both, &sysctls);
    let text = installed.unwrap_err().to_string();
    assert!(
        text.ends_with("sysctl net.ipv4.no_such_thing = 1: No such file or directory"),
        "{text}"
    );
    scene.assert_initial_state();

    scene.inside.ip(&["link", "set", "lo", "down"]);
    let text = scene.try_install(Families::Both, "1").unwrap_err().to_string();
    assert!(
        text.ends_with("IPv6 route local default dev lo table 29700: Network is down (is lo up?)"),
        "{text}"
    );
    scene.inside.ip(&["link", "set", "lo", "up"]);
    scene.assert_initial_state();
}

#[test]
fn rules_and_routes_are_deleted_without_the_journal() {
    let scene = Scene::new();
    let install_and_drop_after = |journal: &Path| {
        let route = scene.install();
        let guard = route.steer(marked(Family::V6)).unwrap();
        fs::remove_dir_all(journal).unwrap();
        (route, guard)
    };
    let lost = install_and_drop_after(scene.journal.path());
    drop(lost);
    assert!(!snapshot(&scene.inside).contains("29700"));

    // A file in its place prevents the directory from being created again.
    let unusable = install_and_drop_after(scene.journal.path());
    fs::write(scene.journal.path(), "").unwrap();
    drop(unusable);
    assert!(!snapshot(&scene.inside).contains("29700"));
    assert_eq!(scene.sysctls(), ["1", "1", "1"], "the original values are lost");
    fs::remove_file(scene.journal.path()).unwrap();
    fs::create_dir(scene.journal.path()).unwrap();
}

#[test]
fn rule_is_kept_until_its_last_guard_is_dropped() {
    let scene = Scene::new();
    let route = scene.install();
    let first = route.steer(udp_reply(53)).unwrap();
    let second = route.steer(udp_reply(53)).unwrap();
    assert_eq!(route.selectors(), 1);
    assert_eq!(scene.rules().matches("sport 53").count(), 1);
    drop(first);
    assert_eq!(scene.rules().matches("sport 53").count(), 1);
    drop(second);
    assert_eq!((route.selectors(), scene.rules().matches("sport 53").count()), (0, 0));
}

#[test]
fn deleting_a_general_rule_keeps_specific_ones() {
    let scene = Scene::new();
    let route = scene.install();
    let special = [53, 54].map(|port| route.steer(udp_reply(port)).unwrap());
    let general = route.steer(Selector { source_port: None, ..udp_reply(0) }).unwrap();
    let later = route.steer(udp_reply(55)).unwrap();
    drop(general);
    for port in [53, 54, 55] {
        let line = format!("from all to 203.0.113.9 ipproto udp sport {port} lookup 29700");
        assert_eq!(scene.rules().matches(&line).count(), 1, "{}", scene.rules());
    }
    assert_eq!(scene.rules().matches("29700").count(), 3);
    drop((special, later));
    assert_eq!(scene.rules().matches("29700").count(), 0);
}

#[test]
fn number_of_rules_is_limited() {
    let scene = Scene::new();
    let route = scene.install();
    let guards: Vec<_> =
        (1..).take(MAX_SELECTORS).map(|port| route.steer(udp_reply(port)).unwrap()).collect();
    let error = route.steer(udp_reply(9_999)).unwrap_err();
    assert!(error.to_string().ends_with("limit of 256 rules reached"), "{error}");
    let again = route.steer(udp_reply(1)).unwrap();
    drop((guards, again));
    assert!(route.steer(udp_reply(9_999)).is_ok());
    drop(route);
    scene.assert_initial_state();
}

#[test]
fn all_rules_of_a_killed_owner_are_deleted() {
    let scene = Scene::new();
    let route = scene.install();
    let guards: Vec<_> =
        (1..).take(MAX_SELECTORS).map(|port| route.steer(udp_reply(port)).unwrap()).collect();
    // Leaks the guards and the policy route, as in a killed process. Another policy route then
    // deletes all their rules as those of an exited process.
    std::mem::forget(guards);
    drop(route);
    let journal = fs::read_dir(scene.journal.path()).unwrap().next().unwrap().unwrap().path();
    let mut written: serde_json::Value =
        serde_json::from_slice(&fs::read(&journal).unwrap()).unwrap();
    written["owners"][0]["process"]["start_time"] = 1.into();
    fs::write(&journal, written.to_string()).unwrap();
    assert_eq!(sweep_in(scene.journal.path()).unwrap(), 1);
    scene.assert_initial_state();
}

#[test]
fn externally_flushed_rules_are_tolerated() {
    let scene = Scene::new();
    let route = scene.install();
    let guard = route.steer(marked(Family::V4)).unwrap();
    scene.inside.ip_all("rule del priority 7400\nroute flush table 29700");
    drop((guard, route));
    scene.assert_initial_state();
}

#[test]
fn invalid_selectors_are_rejected() {
    let scene = Scene::new();
    let route = scene.install();
    let id = scene.namespace.id();
    let text = |selector| route.steer(selector).unwrap_err().to_string();
    assert_eq!(
        text(Selector::new(Family::V6)),
        format!("policy route in namespace {id}: IPv6 rule from all: it would match every packet")
    );
    assert!(
        text(Selector { to: Some(addr::CLIENT_V6.into()), ..udp_reply(53) })
            .ends_with("address of another family")
    );
    let long =
        Selector { input_interface: Some("sixteen-bytes-xx".to_owned()), ..marked(Family::V4) };
    assert!(text(long).contains("rule fwmark 0x74670001 iif sixteen-bytes-xx lookup 29700: "));
}

#[test]
fn number_of_slots_is_limited() {
    let scene = Scene::new();
    let owners: Vec<_> = OwnerSlot::all().map(|_| scene.install()).collect();
    let error = scene.try_install(Families::V4, "1").unwrap_err();
    assert!(error.to_string().ends_with("all 256 owner slots are in use"), "{error}");
    drop(owners);
    scene.assert_initial_state();
}

#[test]
fn concurrent_installations_get_distinct_slots() {
    let scene = Scene::new();
    let mut slots = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| scene.install())).collect();
        let routes: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        routes.iter().map(|route| route.slot()).collect::<Vec<_>>()
    });
    slots.sort_unstable();
    slots.dedup();
    assert_eq!(slots.len(), 8);
    scene.assert_initial_state();
}
