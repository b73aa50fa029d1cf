//! The dashboard files, and their expressions as Grafana sends them.

use super::server::Prometheus;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;

/// A file of `grafana/dashboards/`.
pub(crate) struct Dashboard {
    pub(crate) uid: String,
    pub(crate) panels: Vec<Panel>,
    pub(crate) variables: Vec<Variable>,
    json: Value,
}

/// A panel with queries.
pub(crate) struct Panel {
    pub(crate) title: String,
    pub(crate) targets: Vec<Target>,
}

/// A query of a panel.
pub(crate) struct Target {
    pub(crate) expression: String,
    /// Evaluated at one moment, rather than over a range.
    pub(crate) instant: bool,
}

/// A template variable with values selected by the user, and their pattern in an expression.
#[derive(Clone)]
pub(crate) struct Variable {
    name: String,
    query: String,
    pattern: String,
}

/// `path` relative to the root of the repository.
pub(crate) fn root(path: &str) -> String {
    format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))
}

/// All dashboards, with "All" selected for every variable.
pub(crate) fn all() -> Vec<Dashboard> {
    let entries = fs::read_dir(root("grafana/dashboards")).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let dashboard =
        |path| Dashboard::new(serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap());
    paths.iter().map(dashboard).collect()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is not a string")).to_owned()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or_else(|| panic!("{value} is not an array"), Vec::as_slice)
}

impl Dashboard {
    fn new(json: Value) -> Self {
        let target = |target: &Value| Target {
            expression: text(&target["expr"]),
            instant: target["instant"].as_bool().unwrap(),
        };
        let panel = |panel: &Value| Panel {
            title: text(&panel["title"]),
            targets: list(&panel["targets"]).iter().map(target).collect(),
        };
        let variable = |variable: &Value| Variable {
            name: text(&variable["name"]),
            query: text(&variable["query"]["query"]),
            pattern: text(&variable["allValue"]),
        };
        let panels = list(&json["panels"]).iter().filter(|panel| panel["type"] != "row");
        let variables =
            list(&json["templating"]["list"]).iter().filter(|variable| variable["type"] == "query");
        Self {
            uid: text(&json["uid"]),
            panels: panels.map(panel).collect(),
            variables: variables.map(variable).collect(),
            json,
        }
    }

    /// Checks identity, variables, titles, units and positions, and that links point to `uids`.
    #[track_caller]
    pub(crate) fn check(&self, uids: &BTreeSet<&str>) {
        let (json, uid) = (&self.json, &self.uid);
        assert!(json["id"].is_null() && json["schemaVersion"].as_u64().unwrap() >= 39, "{uid}");
        assert_eq!(list(&json["tags"]), ["tidegate"], "{uid}");
        assert_eq!(
            json["links"][0]["tags"][0], "tidegate",
            "{uid}: a list of the other dashboards"
        );
        let names: Vec<String> =
            list(&json["templating"]["list"]).iter().map(|one| text(&one["name"])).collect();
        assert_eq!(names[..2], ["datasource", "instance"], "{uid}");
        let mut ids = BTreeSet::new();
        let mut taken = BTreeSet::new();
        for panel in list(&json["panels"]) {
            let title = text(&panel["title"]);
            assert!(ids.insert(panel["id"].as_u64().unwrap()), "{uid}: {title}: duplicate id");
            let [x, y, w, h] =
                ["x", "y", "w", "h"].map(|key| panel["gridPos"][key].as_u64().unwrap());
            assert!(w > 0 && h > 0 && x + w <= 24, "{uid}: {title}");
            for place in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
                assert!(taken.insert(place), "{uid}: {title} covers another");
            }
            if panel["type"] == "row" {
                continue;
            }
            assert!(title.ends_with('?'), "{uid}: {title} is not a question");
            assert!(!text(&panel["fieldConfig"]["defaults"]["unit"]).is_empty(), "{uid}: {title}");
            assert_eq!(panel["datasource"]["uid"], "${datasource}", "{uid}: {title}");
            let references: BTreeSet<String> =
                list(&panel["targets"]).iter().map(|target| text(&target["refId"])).collect();
            assert_eq!(references.len(), list(&panel["targets"]).len(), "{uid}: {title}");
            for target in list(&panel["targets"]) {
                assert_eq!(target["datasource"]["uid"], "${datasource}", "{uid}: {title}");
                assert!(
                    text(&target["expr"]).contains("$instance"),
                    "{uid}: {title} is of all instances"
                );
            }
        }
        let everything = json.to_string();
        for link in everything.split("\"/d/").skip(1) {
            let target = link.split(['?', '"', '/']).next().unwrap();
            assert!(uids.contains(target), "{uid}: link to {target}");
        }
    }
}

impl Variable {
    /// The dashboard with all values of its variables selected. There must be some.
    #[track_caller]
    pub(crate) fn with_all_values(&self, server: &Prometheus) -> Self {
        let (_, query) = self.query.split_once("label_values(").unwrap();
        let (selector, label) = query.strip_suffix(')').unwrap().rsplit_once(", ").unwrap();
        let all =
            Self { name: "instance".to_owned(), query: String::new(), pattern: ".*".to_owned() };
        let values = server.label_values(label, &interpolate(selector, &[all]));
        // There are no services without a cluster.
        let is_of_services = self.query.contains("tidegate_mesh_service");
        assert!(!values.is_empty() || is_of_services, "{}", self.query);
        let values: Vec<String> = values.iter().map(|value| escaped(value)).collect();
        Self { pattern: format!("({})", values.join("|")), ..self.clone() }
    }
}

/// A value in the escaping of Grafana for a regular expression within a string.
fn escaped(value: &str) -> String {
    let special =
        |c| if r"\$^*{}[]'+?.()|".contains(c) { format!(r"\\{c}") } else { String::from(c) };
    value.chars().map(special).collect()
}

/// `expression` with the values of `variables` and of the built-in variables.
pub(crate) fn interpolate(expression: &str, variables: &[Variable]) -> String {
    let mut text = expression.replace("$__rate_interval", "30s");
    for variable in variables {
        text = text.replace(&format!("${}", variable.name), &variable.pattern);
    }
    assert!(!text.contains('$'), "{text}: a variable that the dashboard does not have");
    text
}
