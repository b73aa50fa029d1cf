//! The routes of the API and their handlers.

use super::events;
use super::json_lines::json_lines;
use super::long_running::LongRunning;
use super::mesh;
use super::problem::{Problem, blocking};
use super::projects;
use super::request::{
    Body, MAX_BODY, Named, attachment, json, network_spec, parse_name, send, text,
};
use super::reserve::{Reserved, label_of, parse_spec, reserve_specs};
use super::services;
use super::view::{Order, View, port_of};
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::{StatusCode, Uri};
use axum::response::IntoResponse;
use axum::routing::{delete, get, put};
use axum::{Extension, Json, Router};
use futures_util::stream::unfold;
use serde::Deserialize;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tidegate_api::types::{
    Driver, Endpoint, ErrorBody, Figures, Network, NewEndpoint, NewNamespace, NewNetwork, NewPorts,
    NewTask, Port, Status,
};
use tidegate_control::{AttachSpec, Command, PublishedPort, Task};
use tidegate_mesh::balance::MAX_WEIGHT;
use tidegate_model::PublishLabel;
use tidegate_publish::bind::runs;
use tidegate_publish::publisher::{PortId, PublishError};
use tokio::time::timeout;
use utoipa::OpenApi;

/// Pauses between the figures of a stream, in milliseconds.
const INTERVALS: RangeInclusive<u32> = 100..=3_600_000;

/// The OpenAPI document.
/// Maximum time that the answer waits for the connections of a task that is detached.
const DRAIN: Duration = Duration::from_secs(20);

#[derive(OpenApi)]
#[openapi(
    info(
        title = "tidegate",
        description = "The networks and endpoints of `tidegate daemon`, or the project of `tidegate up`, on this host. HTTP over a Unix socket, for the user who started it and for root."
    ),
    paths(
        status,
        networks,
        add_network,
        network,
        remove_network,
        endpoints,
        attach,
        endpoint,
        detach,
        set_namespace,
        ports,
        add_ports,
        remove_port,
        projects::projects,
        projects::up,
        projects::project,
        projects::down,
        projects::logs,
        mesh::report,
        mesh::join,
        mesh::leave,
        mesh::remove_host,
        services::services,
        services::create,
        services::service,
        services::scale,
        services::remove,
        events::events,
        figures,
        document
    ),
    components(schemas(ErrorBody))
)]
struct Document;

type Response<T> = Result<Json<T>, Problem>;

/// All routes, over `view`.
pub(super) fn router(view: Arc<View>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/networks", get(networks).post(add_network))
        .route("/v1/networks/{name}", get(network).delete(remove_network))
        .route("/v1/endpoints", get(endpoints).post(attach))
        .route("/v1/endpoints/{name}", get(endpoint).delete(detach))
        .route("/v1/endpoints/{name}/namespace", put(set_namespace))
        .route("/v1/ports", get(ports).post(add_ports))
        .route("/v1/ports/{id}", delete(remove_port))
        .route(
            "/v1/projects",
            get(projects::projects)
                .post(projects::up)
                .layer(DefaultBodyLimit::max(projects::MAX_PROJECT)),
        )
        .route("/v1/projects/{name}", get(projects::project).delete(projects::down))
        .route("/v1/projects/{name}/logs", get(projects::logs))
        .route("/v1/mesh", get(mesh::report).post(mesh::join).delete(mesh::leave))
        .route("/v1/mesh/hosts/{name}", delete(mesh::remove_host))
        .route("/v1/services", get(services::services).post(services::create))
        .route(
            "/v1/services/{name}",
            get(services::service).patch(services::scale).delete(services::remove),
        )
        .route("/v1/events", get(events::events))
        .route("/v1/figures", get(figures))
        .route("/v1/openapi.json", get(document))
        .fallback(no_such_path)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(view)
}

/// The running project and the state of its services
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = Status)))]
async fn status(State(view): State<Arc<View>>) -> Json<Status> {
    Json(view.status())
}

/// All networks
#[utoipa::path(get, path = "/v1/networks", responses((status = 200, body = Vec<Network>)))]
async fn networks(State(view): State<Arc<View>>) -> Json<Vec<Network>> {
    Json(view.networks())
}

/// One network
#[utoipa::path(
    get,
    path = "/v1/networks/{name}",
    params(("name" = String, Path)),
    responses((status = 200, body = Network), (status = 404, body = ErrorBody))
)]
async fn network(State(view): State<Arc<View>>, name: Named) -> Response<Network> {
    find_network(&view, &text(name)?)
}

/// Create a network
///
/// Networks and endpoints are added to a daemon. A project in the foreground is changed by its
/// Compose file only.
#[utoipa::path(
    post,
    path = "/v1/networks",
    request_body = NewNetwork,
    responses(
        (status = 201, body = Network),
        (status = 400, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "The name or the subnet is in use, or this is not a daemon."),
        (status = 413, body = ErrorBody),
        (status = 500, body = ErrorBody),
        (status = 503, body = ErrorBody, description = "The firewall is busy; a retry may succeed.")
    )
)]
async fn add_network(
    State(view): State<Arc<View>>,
    body: Body,
) -> Result<(StatusCode, Json<Network>), Problem> {
    let new = json::<NewNetwork>(body)?;
    let (name, driver) = (new.name.clone(), new.driver);
    let spec = network_spec(new)?;
    match driver {
        Driver::Bridge => order(&view, Command::CreateNetwork(spec), Reserved::new()).await?,
        Driver::Overlay => {
            send(&view.orders, |done| Order::CreateOverlay { spec, done }).await?;
        }
    }
    Ok((StatusCode::CREATED, find_network(&view, &name)?))
}

/// Remove a network without endpoints
#[utoipa::path(
    delete,
    path = "/v1/networks/{name}",
    params(("name" = String, Path)),
    responses(
        (status = 204),
        (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "The network has endpoints, or this is not a daemon."),
        (status = 500, body = ErrorBody),
        (status = 503, body = ErrorBody, description = "The firewall is busy; a retry may succeed.")
    )
)]
async fn remove_network(State(view): State<Arc<View>>, name: Named) -> Result<StatusCode, Problem> {
    let name = parse_name(&text(name)?)?;
    order(&view, Command::RemoveNetwork(name), Reserved::new()).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// All endpoints, with their attachments and published ports
#[utoipa::path(get, path = "/v1/endpoints", responses((status = 200, body = Vec<Endpoint>)))]
async fn endpoints(State(view): State<Arc<View>>) -> Json<Vec<Endpoint>> {
    Json(view.endpoints())
}

/// One endpoint
#[utoipa::path(
    get,
    path = "/v1/endpoints/{name}",
    params(("name" = String, Path)),
    responses((status = 200, body = Endpoint), (status = 404, body = ErrorBody))
)]
async fn endpoint(State(view): State<Arc<View>>, name: Named) -> Response<Endpoint> {
    find_endpoint(&view, text(name)?)
}

/// Attach a network namespace to networks
#[utoipa::path(
    post,
    path = "/v1/endpoints",
    request_body = NewEndpoint,
    responses(
        (status = 201, body = Endpoint),
        (status = 400, body = ErrorBody, description = "The path is not a network namespace, or an address or a port is invalid."),
        (status = 404, body = ErrorBody, description = "A network does not exist."),
        (status = 409, body = ErrorBody, description = "A name, an address, a port or the namespace is in use, or this is not a daemon."),
        (status = 413, body = ErrorBody),
        (status = 500, body = ErrorBody),
        (status = 503, body = ErrorBody, description = "The firewall is busy; a retry may succeed.")
    )
)]
async fn attach(
    State(view): State<Arc<View>>,
    body: Body,
) -> Result<(StatusCode, Json<Endpoint>), Problem> {
    let new = json::<NewEndpoint>(body)?;
    let name = new.name.clone();
    let specs = new.ports.clone();
    let reserved = blocking(move || reserve_specs(&specs)).await??;
    let command = Command::Attach(attach_spec(new, reserved.keys().copied().collect())?);
    order(&view, command, reserved).await?;
    Ok((StatusCode::CREATED, find_endpoint(&view, name)?))
}

/// Detach an endpoint, and close its published ports
///
/// A task of a service is detached once its connections have ended, or after the drain time of the
/// service.
#[utoipa::path(
    delete,
    path = "/v1/endpoints/{name}",
    params(("name" = String, Path)),
    responses(
        (status = 202, description = "Connections of the task are open, and it is detached later."),
        (status = 204),
        (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "This is not a daemon, or the endpoint is being detached already."),
        (status = 500, body = ErrorBody),
        (status = 503, body = ErrorBody, description = "The firewall is busy; a retry may succeed.")
    )
)]
async fn detach(State(view): State<Arc<View>>, name: Named) -> Result<StatusCode, Problem> {
    let name = parse_name(&text(name)?)?;
    match timeout(DRAIN, order(&view, Command::Detach(name), Reserved::new())).await {
        Ok(detached) => detached.map(|()| StatusCode::NO_CONTENT),
        Err(_) => Ok(StatusCode::ACCEPTED),
    }
}

/// Attach an adopted endpoint to another namespace
///
/// Use this after its container was recreated. The endpoint keeps its interfaces, addresses and
/// published ports. If the path of an adopted namespace leads to a new namespace, tidegate
/// re-attaches the endpoint without this request.
#[utoipa::path(
    put,
    path = "/v1/endpoints/{name}/namespace",
    params(("name" = String, Path)),
    request_body = NewNamespace,
    responses(
        (status = 200, body = Endpoint),
        (status = 400, body = ErrorBody, description = "The path is not a network namespace."),
        (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "The endpoint was not adopted, or its interfaces conflict with those of the namespace."),
        (status = 413, body = ErrorBody),
        (status = 500, body = ErrorBody)
    )
)]
async fn set_namespace(
    State(view): State<Arc<View>>,
    name: Named,
    body: Body,
) -> Response<Endpoint> {
    let (name, new) = (text(name)?, json::<NewNamespace>(body)?);
    let netns = PathBuf::from(new.netns);
    if !netns.is_absolute() {
        return Err(Problem::bad_request(&format!(
            "netns: {} is not an absolute path",
            netns.display()
        )));
    }
    if view.projects.as_ref().is_some_and(|projects| projects.runs(&name)) {
        return Err(part_of_project(&name));
    }
    let endpoint = name.clone();
    send(&view.orders, |done| Order::Reattach { endpoint, netns, done }).await?;
    find_endpoint(&view, name)
}

/// All published ports
#[utoipa::path(get, path = "/v1/ports", responses((status = 200, body = Vec<Port>)))]
async fn ports(State(view): State<Arc<View>>) -> Json<Vec<Port>> {
    Json(view.ports())
}

/// Publish ports of an endpoint, either all of them or none
#[utoipa::path(
    post,
    path = "/v1/ports",
    request_body = NewPorts,
    responses(
        (status = 201, body = Vec<Port>, description = "The published ports."),
        (status = 400, body = ErrorBody),
        (status = 404, body = ErrorBody, description = "The endpoint does not exist."),
        (status = 409, body = ErrorBody, description = "A port is in use; the error names the holder."),
        (status = 413, body = ErrorBody),
        (status = 500, body = ErrorBody),
        (status = 503, body = ErrorBody, description = "The firewall is busy; a retry may succeed.")
    )
)]
async fn add_ports(
    State(view): State<Arc<View>>,
    body: Body,
) -> Result<(StatusCode, Json<Vec<Port>>), Problem> {
    let new = json::<NewPorts>(body)?;
    if view.state_file.is_some() {
        return publish_durably(&view, new).await;
    }
    let spec = parse_spec(&new.spec)?;
    // Binding sockets is fast; finding the holder of a port in use is slow.
    let endpoint = new.endpoint.clone();
    let publisher = Arc::clone(&view.publisher);
    let opened = blocking(move || publisher.publish(&endpoint, &spec)).await??;
    view.ports_changed.send_replace(());
    let ports: Vec<_> = opened.iter().map(|port| (port.label, port.container_port)).collect();
    for (publish, to) in runs(&ports) {
        tracing::info!(publish, endpoint = new.endpoint, to, "published");
    }
    Ok((StatusCode::CREATED, Json(opened.iter().map(port_of).collect())))
}

/// Close a published port and reset its connections
#[utoipa::path(
    delete,
    path = "/v1/ports/{id}",
    params(("id" = u32, Path)),
    responses(
        (status = 204),
        (status = 404, body = ErrorBody),
        (status = 500, body = ErrorBody),
        (status = 503, body = ErrorBody, description = "The firewall is busy; a retry may succeed.")
    )
)]
async fn remove_port(State(view): State<Arc<View>>, id: Named) -> Result<StatusCode, Problem> {
    let id = text(id)?;
    let not_there = || Problem::not_found(&format!("there is no published port {id:?}"));
    let number = id.parse().map_err(|_| not_there())?;
    if view.state_file.is_some() {
        let open = view.publisher.ports().into_iter().find(|port| port.id == PortId(number));
        let open = open.ok_or_else(not_there)?;
        if open.endpoint.contains('/') {
            return Err(part_of_project(&open.endpoint));
        }
        let label = open.label;
        let (address, port) = (label.address().ip(), label.address().port());
        let command = Command::Unpublish { address, port, protocol: label.protocol() };
        order(&view, command, Reserved::new()).await?;
        return Ok(StatusCode::NO_CONTENT);
    }
    let publisher = Arc::clone(&view.publisher);
    let removed = blocking(move || publisher.unpublish(PortId(number))).await?;
    view.ports_changed.send_replace(());
    let port = removed.ok_or_else(not_there)?;
    tracing::info!(publish = %port.label, endpoint = port.endpoint, "port closed");
    Ok(StatusCode::NO_CONTENT)
}

/// The query of [`figures`].
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
struct FiguresQuery {
    /// Send the figures again and again, one JSON object per line, with this pause in milliseconds.
    #[param(minimum = 100, maximum = 3_600_000)]
    interval_ms: Option<u32>,
}

/// Counters and current values of ports, networks, the NAT engine and name servers
#[utoipa::path(
    get,
    path = "/v1/figures",
    params(FiguresQuery),
    responses(
        (status = 200, body = Figures),
        (status = 400, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "Too many clients follow figures, events or logs.")
    )
)]
async fn figures(
    State(view): State<Arc<View>>,
    Extension(connection): Extension<LongRunning>,
    Query(query): Query<FiguresQuery>,
) -> Result<axum::response::Response, Problem> {
    let Some(interval) = query.interval_ms else {
        return read_figures(view).await.map(|figures| Json(figures).into_response());
    };
    if !INTERVALS.contains(&interval) {
        let (least, most) = INTERVALS.into_inner();
        return Err(Problem::bad_request(&format!(
            "interval_ms={interval}: use {least} to {most} milliseconds"
        )));
    }
    connection.lift()?;
    let interval = Duration::from_millis(interval.into());
    let stream = unfold((view, interval, false), async |(view, interval, follows)| {
        if follows {
            tokio::time::sleep(interval).await;
        }
        let figures = read_figures(Arc::clone(&view)).await.ok()?;
        Some((vec![figures], (view, interval, true)))
    });
    Ok(json_lines(stream))
}

async fn read_figures(view: Arc<View>) -> Result<Figures, Problem> {
    // Slow with a quarter of a million ports.
    blocking(move || view.figures()).await
}

/// This document
#[utoipa::path(get, path = "/v1/openapi.json", responses((status = 200, body = serde_json::Value)))]
async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(Document::openapi())
}

async fn no_such_path(uri: Uri) -> Problem {
    Problem::not_found(&format!("path {} does not exist; see /v1/openapi.json", uri.path()))
}

async fn method_not_allowed(uri: Uri) -> Problem {
    let line = format!("{} does not support this method; see /v1/openapi.json", uri.path());
    Problem::of(StatusCode::METHOD_NOT_ALLOWED, &line)
}

/// Publishes ports by a command to the owner of the state.
async fn publish_durably(
    view: &View,
    new: NewPorts,
) -> Result<(StatusCode, Json<Vec<Port>>), Problem> {
    let spec = [new.spec];
    let reserved = blocking(move || reserve_specs(&spec)).await??;
    let ports: Vec<PublishedPort> = reserved.keys().copied().collect();
    let labels: Vec<PublishLabel> = ports.iter().map(label_of).collect();
    let command = Command::Publish { endpoint: parse_name(&new.endpoint)?, ports };
    order(view, command, reserved).await?;
    let opened = view.publisher.ports();
    let opened = opened.iter().filter(|port| labels.contains(&port.label)).map(port_of);
    Ok((StatusCode::CREATED, Json(opened.collect())))
}

/// Sends `command` to the owner of the state, and waits until it is in force and durable.
async fn order(view: &View, command: Command, reserved: Reserved) -> Result<(), Problem> {
    send(&view.orders, |done| Order::Command { command, reserved, done }).await
}

fn attach_spec(new: NewEndpoint, ports: Vec<PublishedPort>) -> Result<AttachSpec, Problem> {
    Ok(AttachSpec {
        name: parse_name(&new.name)?,
        namespace: new.netns.into(),
        networks: new.networks.iter().map(attachment).collect::<Result<_, Problem>>()?,
        hostname: new.hostname,
        dns: Vec::new(),
        ports,
        task: new.task.map(task).transpose()?,
    })
}

fn task(new: NewTask) -> Result<Task, Problem> {
    if !(1..=MAX_WEIGHT).contains(&new.weight) {
        return Err(Problem::bad_request(&format!("a weight is 1 to {MAX_WEIGHT}")));
    }
    if new.health_command.as_ref().is_some_and(Vec::is_empty) {
        return Err(Problem::bad_request(&"the health check has no command"));
    }
    let service = parse_name(&new.service)?.to_string();
    Ok(Task { service, weight: new.weight, health_command: new.health_command })
}

fn part_of_project(endpoint: &str) -> Problem {
    let project = endpoint.split('/').next().unwrap_or_default();
    Problem::conflict(&format!(
        "endpoint {endpoint} belongs to project {project}, and is changed with it only"
    ))
}

fn find_network(view: &View, name: &str) -> Response<Network> {
    let found = view.networks().into_iter().find(|network| network.name == name);
    found.map(Json).ok_or_else(|| Problem::not_found(&format!("there is no network {name:?}")))
}

fn find_endpoint(view: &View, name: String) -> Response<Endpoint> {
    let found = view.endpoints().into_iter().find(|endpoint| endpoint.name == name);
    found.map(Json).ok_or_else(|| PublishError::NoEndpoint(name).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_describes_every_route() {
        let document = serde_json::to_value(Document::openapi()).unwrap();
        let paths: Vec<&String> = document["paths"].as_object().unwrap().keys().collect();
        assert_eq!(
            paths,
            [
                "/v1/endpoints",
                "/v1/endpoints/{name}",
                "/v1/endpoints/{name}/namespace",
                "/v1/events",
                "/v1/figures",
                "/v1/mesh",
                "/v1/mesh/hosts/{name}",
                "/v1/networks",
                "/v1/networks/{name}",
                "/v1/openapi.json",
                "/v1/ports",
                "/v1/ports/{id}",
                "/v1/projects",
                "/v1/projects/{name}",
                "/v1/projects/{name}/logs",
                "/v1/services",
                "/v1/services/{name}",
                "/v1/status"
            ]
        );
    }
}
