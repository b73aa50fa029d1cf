//! An installed Prometheus with the configuration of `grafana/`, and its HTTP API.

use super::dashboards::root;
use serde_json::Value;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tidegate_testbed::{Namespace, Process, eventually};

/// The metrics address in the configuration.
pub(crate) const TARGET: &str = "127.0.0.1:9464";
/// The metrics address of a second instance, added by the test.
pub(crate) const OTHER_TARGET: &str = "127.0.0.1:9465";
const ADDRESS: &str = "127.0.0.1:9090";
const SOON: Duration = Duration::from_secs(10);
/// The scrape interval, instead of that of the configuration.
const INTERVAL: &str = "200ms";

/// A Prometheus in a namespace, killed and removed with its data on drop.
pub(crate) struct Prometheus {
    host: Namespace,
    _process: Process,
    _directory: tempfile::TempDir,
}

/// The result of an expression.
#[derive(Debug)]
pub(crate) enum Answer {
    /// Instant values.
    Vector(Vec<f64>),
    /// Values over a range.
    Matrix(Vec<f64>),
    /// The error of the evaluation.
    Error(String),
}

impl Answer {
    /// Whether the result contains a number.
    pub(crate) fn has_data(&self) -> bool {
        match self {
            Self::Vector(values) | Self::Matrix(values) => {
                values.iter().any(|value| value.is_finite())
            }
            Self::Error(_) => false,
        }
    }

    /// The only value of the result.
    pub(crate) fn single(&self) -> Option<f64> {
        match self {
            Self::Vector(values) if values.len() == 1 => Some(values[0]),
            _ => None,
        }
    }
}

/// A rule as loaded by Prometheus.
pub(crate) struct Rule {
    pub(crate) name: String,
    /// `recording` or `alerting`.
    pub(crate) kind: String,
    pub(crate) expression: String,
    pub(crate) health: String,
    pub(crate) error: String,
}

impl Prometheus {
    /// Starts it in `host` with the configuration of `grafana/` except for intervals, and waits
    /// until it is ready.
    #[track_caller]
    pub(crate) fn start(host: &Namespace) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let configuration = fs::read_to_string(root("grafana/prometheus.yml")).unwrap();
        assert!(configuration.contains(TARGET), "{configuration}");
        let quick = configuration.replace("15s", INTERVAL);
        assert_eq!(quick.matches(INTERVAL).count(), 2, "{configuration}");
        let (one, both) =
            (format!("[\"{TARGET}\"]"), format!("[\"{TARGET}\", \"{OTHER_TARGET}\"]"));
        assert!(quick.contains(&one), "{configuration}");
        let quick = quick.replace(&one, &both);
        let file = directory.path().join("prometheus.yml");
        fs::write(&file, quick).unwrap();
        fs::create_dir(directory.path().join("rules")).unwrap();
        for name in ["alerts.yml", "recording.yml"] {
            let rules = directory.path().join("rules").join(name);
            fs::copy(root(&format!("grafana/rules/{name}")), rules).unwrap();
        }
        let mut command = host.command("prometheus");
        command.arg(format!("--config.file={}", file.display()));
        command.arg(format!("--storage.tsdb.path={}", directory.path().join("data").display()));
        command.arg(format!("--web.listen-address={ADDRESS}")).current_dir(directory.path());
        let process = Process::spawn(&mut command);
        process.wait_for_line("Server is ready to receive web requests", SOON);
        Self { host: host.clone(), _process: process, _directory: directory }
    }

    /// Waits until it has scraped each target `more` times.
    #[track_caller]
    pub(crate) fn wait_for_scrapes(&self, more: u64) {
        let last = || {
            let targets = self.get("/api/v1/targets?state=active");
            let mut scrapes = Vec::new();
            for target in targets["data"]["activeTargets"].as_array().unwrap() {
                if target["health"] == "up" {
                    let url = target["scrapeUrl"].as_str().unwrap_or_default().to_owned();
                    scrapes
                        .push((url, target["lastScrape"].as_str().unwrap_or_default().to_owned()));
                }
            }
            scrapes.sort();
            scrapes
        };
        let mut before = last();
        for _ in 0..more {
            let mut now = Vec::new();
            let all = eventually(SOON, || {
                now = last();
                now.len() == 2 && now.iter().all(|scrape| !before.contains(scrape))
            });
            assert!(all, "no scrape: {now:?}");
            before = now;
        }
    }

    /// The page that it scrapes.
    pub(crate) fn scrape(&self) -> String {
        http(&self.host, TARGET, "GET", "/metrics", "")
    }

    /// Evaluates `expression` now.
    pub(crate) fn query(&self, expression: &str) -> Answer {
        self.evaluate("/api/v1/query", &form(&[("query", expression)]))
    }

    /// Evaluates `expression` over the duration of the test, in steps of a second.
    pub(crate) fn query_range(&self, expression: &str) -> Answer {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        let (start, end) = ((now - 8.0).to_string(), now.to_string());
        let body = form(&[("query", expression), ("start", &start), ("end", &end), ("step", "1")]);
        self.evaluate("/api/v1/query_range", &body)
    }

    fn evaluate(&self, path: &str, body: &str) -> Answer {
        let text = http(&self.host, ADDRESS, "POST", path, body);
        let answer: Value =
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        if answer["status"] != "success" || !answer["warnings"].is_null() {
            return Answer::Error(text);
        }
        let number = |value: &Value| {
            value[1].as_str().and_then(|text| text.parse().ok()).unwrap_or(f64::NAN)
        };
        let series = answer["data"]["result"].as_array().unwrap();
        match answer["data"]["resultType"].as_str() {
            Some("vector") => {
                Answer::Vector(series.iter().map(|one| number(&one["value"])).collect())
            }
            Some("matrix") => {
                let values = series.iter().flat_map(|one| one["values"].as_array().unwrap());
                Answer::Matrix(values.map(number).collect())
            }
            other => Answer::Error(format!("a result of type {other:?}")),
        }
    }

    /// The values of `label` among the series of `selector`.
    pub(crate) fn label_values(&self, label: &str, selector: &str) -> Vec<String> {
        let answer =
            self.get(&format!("/api/v1/label/{label}/values?{}", form(&[("match[]", selector)])));
        assert_eq!(answer["status"], "success", "{selector}: {answer}");
        answer["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(|value| value.as_str().unwrap().to_owned())
            .collect()
    }

    /// All rules, each evaluated at least once.
    #[track_caller]
    pub(crate) fn rules(&self) -> Vec<Rule> {
        let answer = self.get("/api/v1/rules");
        let groups = answer["data"]["groups"].as_array().unwrap();
        let rules = groups.iter().flat_map(|group| group["rules"].as_array().unwrap());
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let rule = |rule: &Value| Rule {
            name: text(&rule["name"]),
            kind: text(&rule["type"]),
            expression: text(&rule["query"]),
            health: text(&rule["health"]),
            error: text(&rule["lastError"]),
        };
        rules.map(rule).collect()
    }

    fn get(&self, path: &str) -> Value {
        let text = http(&self.host, ADDRESS, "GET", path, "");
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}: {text}"))
    }
}

/// The body of the response.
fn http(host: &Namespace, address: &str, method: &str, path: &str, body: &str) -> String {
    let answer = host.run(|| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        // HTTP/1.0, so that the response is not chunked and ends with the connection.
        let head = format!(
            "{method} {path} HTTP/1.0\r\nHost: {address}\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{path}: {answer}")).1.to_owned()
}

/// `fields` in form encoding.
fn form(fields: &[(&str, &str)]) -> String {
    let mut text = String::new();
    for (name, value) in fields {
        let separator = if text.is_empty() { "" } else { "&" };
        text.push_str(separator);
        for (part, end) in [(name, "="), (value, "")] {
            for byte in part.bytes() {
                if byte.is_ascii_alphanumeric() {
                    text.push(char::from(byte));
                } else {
                    write!(text, "%{byte:02X}").unwrap();
                }
            }
            text.push_str(end);
        }
    }
    text
}
