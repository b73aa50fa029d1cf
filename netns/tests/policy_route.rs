//! Who owns what, and that all of it goes again: rules, routes, sysctls, however an owner ends.

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

/// A namespace, a journal of its own, and what the namespace was like at first.
struct Scene {
    inside: tidegate_testbed::Namespace,
    namespace: Namespace,
    journal: TempDir,
    at_first: String,
}

impl Scene {
    fn new() -> Self {
        let inside = tidegate_testbed::Namespace::new();
        let namespace = Namespace::from_path(&inside.path()).unwrap();
        let at_first = snapshot(&inside);
        Self { inside, namespace, journal: tempfile::tempdir().unwrap(), at_first }
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

    /// An owner in a process of its own: see [`owner_in_another_process`].
    fn owner_elsewhere(&self) -> Process {
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
    fn assert_as_at_first(&self) {
        assert_eq!(snapshot(&self.inside), self.at_first);
        assert_eq!(self.journals(), 0, "nothing is left in the journal");
    }
}

fn rules(namespace: &tidegate_testbed::Namespace) -> String {
    namespace.ip(&["rule"]) + &namespace.ip(&["-6", "rule"])
}

/// Rules, the routes of all tables, and sysctls, in words.
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

/// Not a test but the body of the process that [`Scene::owner_elsewhere`] starts: holds a policy
/// route until it is killed. In a run of the tests it does nothing.
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
fn what_is_installed_goes_with_its_owner() {
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
    scene.assert_as_at_first();
}

#[test]
fn a_guard_keeps_the_policy_route_alive() {
    let scene = Scene::new();
    let guard = scene.install().steer(marked(Family::V4)).unwrap();
    assert!(scene.rules().contains("lookup 29700"));
    drop(guard);
    scene.assert_as_at_first();
}

#[test]
fn one_family_alone_leaves_the_other_untouched() {
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
    scene.assert_as_at_first();
}

#[test]
fn two_owners_do_not_meet() {
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
    assert_eq!(scene.sysctls(), ["1", "1", "1"], "the second needs them");
    drop((of_second, second));
    scene.assert_as_at_first();
}

#[test]
fn a_killed_owner_is_cleaned_up_after_by_the_next() {
    let scene = Scene::new();
    let owner = scene.owner_elsewhere();
    assert!(scene.rules().contains("lookup 29700"));
    Scene::kill(owner);
    assert!(scene.rules().contains("lookup 29700"), "nobody has cleaned up yet");
    let next = scene.install();
    assert_eq!(next.slot(), OwnerSlot(0), "the slot is free again");
    assert!(!scene.rules().contains("lookup 29700"));
    drop(next);
    scene.assert_as_at_first();
}

#[test]
fn a_killed_owner_is_cleaned_up_after_by_a_sweep() {
    let scene = Scene::new();
    let (killed, living) = (scene.owner_elsewhere(), scene.owner_elsewhere());
    assert_eq!(sweep_in(scene.journal.path()).unwrap(), 0, "both live");
    Scene::kill(killed);
    assert_eq!(sweep_in(scene.journal.path()).unwrap(), 1);
    assert!(!scene.rules().contains("lookup 29700") && scene.rules().contains("lookup 29701"));
    assert_eq!(scene.sysctls(), ["1", "1", "1"], "one owner lives");
    Scene::kill(living);
    assert_eq!(sweep_in(scene.journal.path()).unwrap(), 1);
    scene.assert_as_at_first();
}

#[test]
fn a_sweep_finds_a_namespace_through_a_process_in_it() {
    let scene = Scene::new();
    Scene::kill(scene.owner_elsewhere());
    let journal = fs::read_dir(scene.journal.path()).unwrap().next().unwrap().unwrap().path();
    let written = fs::read_to_string(&journal).unwrap();
    let path = scene.inside.path();
    fs::write(&journal, written.replace(path.to_str().unwrap(), "/run/netns/gone")).unwrap();
    let _inhabitant = Process::spawn(scene.inside.command("sleep").arg("60"));
    assert_eq!(sweep_in(scene.journal.path()).unwrap(), 1);
    scene.assert_as_at_first();
}

#[test]
fn the_journal_of_a_namespace_that_is_gone_is_dropped() {
    let scene = Scene::new();
    Scene::kill(scene.owner_elsewhere());
    assert_eq!(scene.journals(), 1);
    let Scene { inside, namespace, journal, .. } = scene;
    drop((inside, namespace));
    assert_eq!(sweep_in(journal.path()).unwrap(), 0);
    assert_eq!(fs::read_dir(journal.path()).unwrap().count(), 0);
}

#[test]
fn a_new_namespace_with_the_number_of_an_old_one_is_left_alone() {
    let scene = Scene::new();
    Scene::kill(scene.owner_elsewhere());
    // The number is the same, the cookie is not: as if the namespace had been made anew.
    let journal = fs::read_dir(scene.journal.path()).unwrap().next().unwrap().unwrap().path();
    let written: serde_json::Value = serde_json::from_slice(&fs::read(&journal).unwrap()).unwrap();
    let cookie = written["identity"]["cookie"].as_u64().expect("a kernel since 5.14 has cookies");
    let text = written.to_string().replace(&format!("\"cookie\":{cookie}"), "\"cookie\":1");
    fs::write(&journal, text).unwrap();
    let left = snapshot(&scene.inside);
    assert_eq!(sweep_in(scene.journal.path()).unwrap(), 0);
    assert_eq!(snapshot(&scene.inside), left);
}

#[test]
fn without_cookies_an_owners_route_proves_the_namespace() {
    let scene = Scene::new();
    Scene::kill(scene.owner_elsewhere());
    let journal = fs::read_dir(scene.journal.path()).unwrap().next().unwrap().unwrap().path();
    let mut written: serde_json::Value =
        serde_json::from_slice(&fs::read(&journal).unwrap()).unwrap();
    written["identity"]["cookie"] = serde_json::Value::Null;
    fs::write(&journal, written.to_string()).unwrap();
    assert_eq!(sweep_in(scene.journal.path()).unwrap(), 1);
    scene.assert_as_at_first();

    // The same record, and a namespace in which that owner's route is not: not the one that is
    // meant.
    scene.inside.sysctl(SYSCTLS[0], "1");
    fs::write(&journal, written.to_string()).unwrap();
    assert_eq!(sweep_in(scene.journal.path()).unwrap(), 0);
    assert_eq!(scene.inside.read_sysctl(SYSCTLS[0]), "1");
}

#[test]
fn rules_and_routes_of_others_survive() {
    let scene = Scene::new();
    // At the priority of slot 0, and at that of slot 1 in our very words but for the protocol; a
    // table in use.
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

    // Added after the slot was taken.
    let route = scene.install();
    let _guard = route.steer(marked(Family::V4)).unwrap();
    scene.inside.ip_all("rule add priority 7403 fwmark 0x74670001 lookup 29703");
    drop((_guard, route));
    scene.inside.ip_all("rule del priority 7403");
    assert_eq!(snapshot(&scene.inside), before);
}

#[test]
fn a_sysctl_that_someone_else_sets_meanwhile_is_theirs() {
    let scene = Scene::new();
    scene.inside.sysctl(SYSCTLS[1], "1");
    let route = scene.install();
    scene.inside.sysctl(SYSCTLS[0], "0");
    drop(route);
    assert_eq!(scene.sysctls(), ["0", "1", "0"], "theirs, as it was before, as it was before");
}

#[test]
fn owners_that_need_different_values_are_told() {
    let scene = Scene::new();
    let first = scene.install();
    let error = scene.try_install(Families::V4, "0").unwrap_err();
    let expected = format!(
        "policy route in namespace {}: sysctl {} is kept at 1 by process {}",
        scene.namespace.id(),
        SYSCTLS[0],
        std::process::id()
    );
    assert_eq!(error.to_string(), expected);
    drop(first);
    scene.assert_as_at_first();
}

#[test]
fn a_failed_installation_leaves_nothing() {
    let scene = Scene::new();
    let sysctls = [Sysctl::new(SYSCTLS[0], "1"), Sysctl::new("net.ipv4.no_such_thing", "1")];
    let installed =
        PolicyRoute::install_in(scene.journal.path(), &scene.namespace, Families::Both, &sysctls);
    let text = installed.unwrap_err().to_string();
    assert!(
        text.ends_with("sysctl net.ipv4.no_such_thing = 1: No such file or directory"),
        "{text}"
    );
    scene.assert_as_at_first();

    scene.inside.ip(&["link", "set", "lo", "down"]);
    let text = scene.try_install(Families::Both, "1").unwrap_err().to_string();
    assert!(
        text.ends_with(
            "IPv6 route local default dev lo table 29700: Network is down (is lo up there?)"
        ),
        "{text}"
    );
    scene.inside.ip(&["link", "set", "lo", "up"]);
    scene.assert_as_at_first();
}

#[test]
fn rules_and_routes_go_although_the_journal_is_lost() {
    let scene = Scene::new();
    let take_out = |journal: &Path| {
        let route = scene.install();
        let guard = route.steer(marked(Family::V6)).unwrap();
        fs::remove_dir_all(journal).unwrap();
        (route, guard)
    };
    let lost = take_out(scene.journal.path());
    drop(lost);
    assert!(!snapshot(&scene.inside).contains("29700"));

    // A file in its place: it cannot even be made anew.
    let unusable = take_out(scene.journal.path());
    fs::write(scene.journal.path(), "").unwrap();
    drop(unusable);
    assert!(!snapshot(&scene.inside).contains("29700"));
    assert_eq!(scene.sysctls(), ["1", "1", "1"], "nobody knows what they were");
    fs::remove_file(scene.journal.path()).unwrap();
    fs::create_dir(scene.journal.path()).unwrap();
}

#[test]
fn a_rule_stays_until_its_last_guard_goes() {
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
fn the_general_rule_goes_and_the_special_ones_stay() {
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
fn rules_have_a_limit() {
    let scene = Scene::new();
    let route = scene.install();
    let guards: Vec<_> =
        (1..).take(MAX_SELECTORS).map(|port| route.steer(udp_reply(port)).unwrap()).collect();
    let error = route.steer(udp_reply(9_999)).unwrap_err();
    assert!(error.to_string().ends_with("256 rules are the limit"), "{error}");
    let again = route.steer(udp_reply(1)).unwrap();
    drop((guards, again));
    assert!(route.steer(udp_reply(9_999)).is_ok());
    drop(route);
    scene.assert_as_at_first();
}

#[test]
fn a_full_set_of_rules_goes_with_a_killed_owner() {
    let scene = Scene::new();
    let route = scene.install();
    let guards: Vec<_> =
        (1..).take(MAX_SELECTORS).map(|port| route.steer(udp_reply(port)).unwrap()).collect();
    // Guards that are never dropped, as in a process that is killed: the policy route is never
    // dropped either, but another one that takes its remains for those of a dead process deletes
    // them all.
    std::mem::forget(guards);
    drop(route);
    let journal = fs::read_dir(scene.journal.path()).unwrap().next().unwrap().unwrap().path();
    let mut written: serde_json::Value =
        serde_json::from_slice(&fs::read(&journal).unwrap()).unwrap();
    written["owners"][0]["process"]["start_time"] = 1.into();
    fs::write(&journal, written.to_string()).unwrap();
    assert_eq!(sweep_in(scene.journal.path()).unwrap(), 1);
    scene.assert_as_at_first();
}

#[test]
fn rules_that_someone_has_cleared_are_no_trouble() {
    let scene = Scene::new();
    let route = scene.install();
    let guard = route.steer(marked(Family::V4)).unwrap();
    scene.inside.ip_all("rule del priority 7400\nroute flush table 29700");
    drop((guard, route));
    scene.assert_as_at_first();
}

#[test]
fn selectors_that_make_no_sense_are_refused() {
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
            .ends_with("not of its family")
    );
    let long =
        Selector { input_interface: Some("sixteen-bytes-xx".to_owned()), ..marked(Family::V4) };
    assert!(text(long).contains("rule fwmark 0x74670001 iif sixteen-bytes-xx lookup 29700: "));
}

#[test]
fn all_slots_can_be_taken_and_no_more() {
    let scene = Scene::new();
    let owners: Vec<_> = OwnerSlot::all().map(|_| scene.install()).collect();
    let error = scene.try_install(Families::V4, "1").unwrap_err();
    assert!(error.to_string().ends_with("all 256 places for owners are taken"), "{error}");
    drop(owners);
    scene.assert_as_at_first();
}

#[test]
fn threads_that_install_at_once_get_a_slot_each() {
    let scene = Scene::new();
    let mut slots = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| scene.install())).collect();
        let routes: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        routes.iter().map(|route| route.slot()).collect::<Vec<_>>()
    });
    slots.sort_unstable();
    slots.dedup();
    assert_eq!(slots.len(), 8);
    scene.assert_as_at_first();
}
