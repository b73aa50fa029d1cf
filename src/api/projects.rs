//! Projects in the background: their routes, and orders to the task that runs them.

use super::json_lines::json_lines;
use super::long_running::LongRunning;
use super::problem::{Problem, blocking};
use super::projects_view::{ProjectOrder, ProjectsView};
use super::request::{Body, Named, attachment, json, network_spec, parse_name, send, text};
use super::reserve::{Reserved, reserve_specs};
use super::view::View;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::{Extension, Json};
use futures_util::stream::unfold;
use serde::Deserialize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tidegate_api::types::{
    ErrorBody, LogLine, NewProject, NewService, OutputStream, Project, RestartPolicy,
};
use tidegate_control::{self as control, AttachSpec, Name, ProjectSpec, Refusal};
use tidegate_model::Restart;
use tokio::sync::mpsc;

/// Maximum size of the body of a new project, in bytes.
pub(super) const MAX_PROJECT: usize = 4 << 20;

/// Lines of logs that are sent if the request does not name a number.
const TAIL: usize = 1_000;

/// All projects in the background
#[utoipa::path(get, path = "/v1/projects", responses((status = 200, body = Vec<Project>)))]
pub(super) async fn projects(State(view): State<Arc<View>>) -> Json<Vec<Project>> {
    Json(view.projects.as_ref().map(|projects| all(projects, &view)).unwrap_or_default())
}

/// One project
#[utoipa::path(
    get,
    path = "/v1/projects/{name}",
    params(("name" = String, Path)),
    responses((status = 200, body = Project), (status = 404, body = ErrorBody))
)]
pub(super) async fn project(
    State(view): State<Arc<View>>,
    name: Named,
) -> Result<Json<Project>, Problem> {
    find(&view, &text(name)?).map(Json)
}

/// Bring a project up in the background
///
/// Creates its networks, publishes its ports and starts its services. The services belong to a
/// process of their own, and continue to run if the daemon ends. The response follows when all
/// services have started.
#[utoipa::path(
    post,
    path = "/v1/projects",
    request_body = NewProject,
    responses(
        (status = 201, body = Project),
        (status = 400, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "The project is up already, an object that it needs is in use, or this is not a daemon."),
        (status = 413, body = ErrorBody),
        (status = 500, body = ErrorBody),
        (status = 503, body = ErrorBody, description = "The firewall is busy; a retry may succeed.")
    )
)]
pub(super) async fn up(
    State(view): State<Arc<View>>,
    Extension(connection): Extension<LongRunning>,
    body: Body,
) -> Result<(StatusCode, Json<Project>), Problem> {
    connection.lift()?;
    let new = json::<NewProject>(body)?;
    let name = new.name.clone();
    let orders = orders(&view)?;
    let (mut spec, ports) = project_spec(new)?;
    // Before its ports are found to be in use by itself.
    let known = view.projects.as_ref().map(|projects| Arc::clone(&projects.state.borrow()));
    if known.is_some_and(|state| state.projects().contains_key(&spec.project.name)) {
        return Err(Problem::conflict(&Refusal::ProjectExists(spec.project.name)));
    }
    let mut reserved = Reserved::new();
    for (endpoint, specs) in spec.endpoints.iter_mut().zip(ports) {
        let of_service = blocking(move || reserve_specs(&specs)).await??;
        endpoint.ports = of_service.keys().copied().collect();
        reserved.extend(of_service);
    }
    send(orders, |done| ProjectOrder::Up { spec, reserved, done }).await?;
    Ok((StatusCode::CREATED, Json(find(&view, &name)?)))
}

/// Take a project down
///
/// Stops its services, with SIGTERM first, then removes its ports, endpoints and networks.
#[utoipa::path(
    delete,
    path = "/v1/projects/{name}",
    params(("name" = String, Path)),
    responses(
        (status = 204),
        (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "The project is being changed, or this is not a daemon."),
        (status = 500, body = ErrorBody),
        (status = 503, body = ErrorBody, description = "The firewall is busy; a retry may succeed.")
    )
)]
pub(super) async fn down(
    State(view): State<Arc<View>>,
    Extension(connection): Extension<LongRunning>,
    name: Named,
) -> Result<StatusCode, Problem> {
    connection.lift()?;
    let project = parse_name(&text(name)?)?;
    send(orders(&view)?, |done| ProjectOrder::Down { project, done }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The query of [`logs`].
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct LogsQuery {
    /// Only this service.
    service: Option<String>,
    /// The number of lines that were written before; 1,000 by default.
    tail: Option<usize>,
    /// Also lines that are written from now on, until the project ends.
    #[serde(default)]
    follow: bool,
}

/// The output of the services of a project
///
/// A sequence of JSON objects, one per line. Each service keeps its last lines: up to 1 MiB of
/// text, and 8 MiB for all services of a project.
#[utoipa::path(
    get,
    path = "/v1/projects/{name}/logs",
    params(("name" = String, Path), LogsQuery),
    responses(
        (status = 200, body = LogLine, content_type = "application/x-ndjson"),
        (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "Too many clients follow logs, or this is not a daemon.")
    )
)]
pub(super) async fn logs(
    State(view): State<Arc<View>>,
    Extension(connection): Extension<LongRunning>,
    name: Named,
    Query(query): Query<LogsQuery>,
) -> Result<Response, Problem> {
    connection.lift()?;
    let project = parse_name(&text(name)?)?;
    let LogsQuery { service, tail, follow } = query;
    let tail = tail.unwrap_or(TAIL);
    let logs = |done| ProjectOrder::Logs { project, service, tail, follow, done };
    let lines = send(orders(&view)?, logs).await?;
    Ok(json_lines(unfold(lines, async |mut lines| {
        let line = line_of(lines.next().await?);
        Some((vec![line], lines))
    })))
}

fn line_of(line: tidegate_services::LogLine) -> LogLine {
    LogLine {
        service: line.service,
        stream: match line.stream {
            tidegate_services::OutputStream::Stdout => OutputStream::Stdout,
            tidegate_services::OutputStream::Stderr => OutputStream::Stderr,
            tidegate_services::OutputStream::Notice => OutputStream::Notice,
        },
        time: humantime::format_rfc3339_millis(line.time).to_string(),
        text: line.text,
    }
}

fn all(projects: &ProjectsView, view: &View) -> Vec<Project> {
    let state = Arc::clone(&projects.state.borrow());
    let supervised = Arc::clone(&projects.supervised.borrow());
    let services = view.status().services;
    let project = |project: &control::Project| {
        let is_part = |name: &&Name| name.is_part_of(&project.name);
        let prefix = format!("{}/", project.name);
        Project {
            name: project.name.to_string(),
            compose_file: project.file.as_ref().map(|file| file.display().to_string()),
            supervisor: supervised.get(&project.name).map(|one| one.pid),
            networks: state.networks().keys().filter(is_part).map(Name::to_string).collect(),
            services: services
                .iter()
                .filter(|service| service.name.starts_with(&prefix))
                .cloned()
                .collect(),
        }
    };
    state.projects().values().map(|one| project(one)).collect()
}

fn find(view: &View, name: &str) -> Result<Project, Problem> {
    let all = view.projects.as_ref().map(|projects| all(projects, view)).unwrap_or_default();
    let found = all.into_iter().find(|project| project.name == name);
    found.ok_or_else(|| Problem::not_found(&format!("there is no project {name:?}")))
}

fn orders(view: &View) -> Result<&mpsc::Sender<ProjectOrder>, Problem> {
    view.projects.as_ref().map(|projects| &projects.orders).ok_or_else(|| {
        Problem::conflict(&format!(
            "project {:?} runs in the foreground, and has no projects in the background; those belong to a daemon \
             (tidegate daemon)",
            view.project
        ))
    })
}

/// Converts a project. Returns the port specs of each endpoint, too.
fn project_spec(new: NewProject) -> Result<(ProjectSpec, Vec<Vec<String>>), Problem> {
    let project = parse_name(&new.name)?;
    let part = |name: &str| -> Result<Name, Problem> {
        Name::new(Some(project.name()), parse_name(name)?.name())
            .map_err(|error| Problem::bad_request(&error))
    };
    let mut networks = Vec::new();
    for network in new.networks {
        networks
            .push(control::NetworkSpec { name: part(&network.name)?, ..network_spec(network)? });
    }
    let (mut endpoints, mut ports, mut services) = (Vec::new(), Vec::new(), Vec::new());
    for service in new.services {
        let invalid =
            |what: &str| Err(Problem::bad_request(&format!("service {:?}: {what}", service.name)));
        match (&service.netns, &service.command[..]) {
            (Some(path), []) if path.starts_with('/') => {}
            (Some(_), []) => return invalid("netns is not an absolute path"),
            (None, [_, ..]) => {}
            _ => return invalid("give either a command or netns"),
        }
        if !service.working_dir.starts_with('/') {
            return invalid("working_dir is not an absolute path");
        }
        let mut of_project = Vec::new();
        for one in &service.networks {
            let network = part(&one.network)?;
            of_project.push(control::NetworkAttachment { network, ..attachment(one)? });
        }
        endpoints.push(AttachSpec {
            task: None,
            name: part(&service.name)?,
            namespace: service.netns.clone().map(PathBuf::from).unwrap_or_default(),
            networks: of_project,
            hostname: service.hostname.clone(),
            dns: service.dns.clone(),
            ports: Vec::new(),
        });
        ports.push(service.ports.clone());
        if service.netns.is_none() {
            services.push(service_spec(service));
        }
    }
    let project = control::Project {
        name: project,
        file: new.compose_file.map(PathBuf::from),
        grace: Duration::from_millis(new.grace_ms),
        services,
    };
    Ok((ProjectSpec { project, networks, endpoints }, ports))
}

fn service_spec(new: NewService) -> control::Service {
    control::Service {
        name: new.name,
        command: new.command,
        environment: new.environment,
        working_dir: new.working_dir.into(),
        dns_search: new.dns_search,
        dns_options: new.dns_options,
        restart: match new.restart {
            RestartPolicy::No => Restart::No,
            RestartPolicy::OnFailure => Restart::OnFailure { max: new.max_restarts },
            RestartPolicy::Always => Restart::Always,
            RestartPolicy::UnlessStopped => Restart::UnlessStopped,
        },
        depends_on: new.depends_on,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(text: &str) -> Result<(ProjectSpec, Vec<Vec<String>>), Problem> {
        project_spec(serde_json::from_str(text).unwrap())
    }

    #[test]
    fn parts_of_a_project_have_its_name() {
        let (spec, ports) = new(
            r#"{ "name": "shop", "networks": [ { "name": "front" } ], "services": [
                { "name": "web", "command": [ "httpd" ], "networks": [ { "network": "front" } ], "ports": [ "80" ],
                  "restart": "on-failure", "max_restarts": 3 },
                { "name": "db", "netns": "/run/netns/db", "networks": [ { "network": "front" } ] } ] }"#,
        )
        .unwrap();
        assert_eq!(spec.networks[0].name.to_string(), "shop/front");
        let names: Vec<String> = spec.endpoints.iter().map(|one| one.name.to_string()).collect();
        assert_eq!(names, ["shop/web", "shop/db"]);
        assert_eq!(spec.endpoints[0].networks[0].network.to_string(), "shop/front");
        assert_eq!(spec.endpoints[1].namespace, PathBuf::from("/run/netns/db"));
        assert_eq!(ports, [vec!["80".to_owned()], vec![]]);
        assert_eq!(spec.project.services.len(), 1, "without the adopted one");
        assert_eq!(spec.project.services[0].restart, Restart::OnFailure { max: Some(3) });
        assert_eq!(spec.project.grace, Duration::from_secs(10));
    }

    #[test]
    fn a_service_has_either_a_command_or_a_namespace() {
        for (service, expected) in [
            (r#"{ "name": "a", "networks": [] }"#, "service \"a\": give either a command or netns"),
            (
                r#"{ "name": "a", "command": [ "x" ], "netns": "/x", "networks": [] }"#,
                "service \"a\": give either a command or netns",
            ),
            (
                r#"{ "name": "a", "netns": "x", "networks": [] }"#,
                "service \"a\": netns is not an absolute path",
            ),
            (
                r#"{ "name": "a", "command": [ "x" ], "working_dir": "x", "networks": [] }"#,
                "service \"a\": working_dir is not an absolute path",
            ),
        ] {
            let text = format!(r#"{{ "name": "p", "networks": [], "services": [ {service} ] }}"#);
            assert_eq!(new(&text).unwrap_err().line, expected);
        }
    }
}
