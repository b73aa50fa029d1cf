//! Handlers of `/v1/services`: the services of the cluster.

use super::problem::Problem;
use super::request::{Body, Named, json, parse_name, send, text};
use super::view::{Order, View};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_api::types::{
    Balance, ErrorBody, HealthCheck, MeshService, NewMeshService, Probe, Scale, ServiceSource,
};
use tidegate_mesh::balance::Method;
use tidegate_mesh::record::{self, ClientSource, Service, ServicePort};
use tidegate_model::{HostPort, PortSpec};

/// Maximum time until all hosts that are heard have published a new service, or reported why not.
const PUBLISHED: Duration = Duration::from_secs(3);

/// Pause between two reports.
const PAUSE: Duration = Duration::from_millis(20);

/// The services of the cluster, as this host knows them
#[utoipa::path(
    get,
    path = "/v1/services",
    responses(
        (status = 200, body = Vec<MeshService>),
        (status = 404, body = ErrorBody, description = "This host is in no cluster.")
    )
)]
pub(super) async fn services(
    State(view): State<Arc<View>>,
) -> Result<Json<Vec<MeshService>>, Problem> {
    send(&view.orders, |done| Order::Services { done }).await.map(Json)
}

/// A service of the cluster
#[utoipa::path(
    get,
    path = "/v1/services/{name}",
    params(("name" = String, Path)),
    responses((status = 200, body = MeshService), (status = 404, body = ErrorBody))
)]
pub(super) async fn service(
    State(view): State<Arc<View>>,
    name: Named,
) -> Result<Json<MeshService>, Problem> {
    find(&view, &text(name)?).await.map(Json)
}

/// Create a service
///
/// The answer comes once all hosts have published its ports, or reported why not.
#[utoipa::path(
    post,
    path = "/v1/services",
    request_body = NewMeshService,
    responses(
        (status = 201, body = MeshService),
        (status = 400, body = ErrorBody),
        (status = 404, body = ErrorBody, description = "The network does not exist."),
        (status = 409, body = ErrorBody, description = "The service exists, a port belongs to another service, or this host is in no cluster."),
        (status = 413, body = ErrorBody),
        (status = 503, body = ErrorBody, description = "etcd does not answer.")
    )
)]
pub(super) async fn create(
    State(view): State<Arc<View>>,
    body: Body,
) -> Result<(StatusCode, Json<MeshService>), Problem> {
    let new: NewMeshService = json(body)?;
    let (name, service) = service_of(new)?;
    let ports = service.ports.len();
    send(&view.orders, |done| Order::CreateService { name: name.clone(), service, done }).await?;
    let deadline = Instant::now() + PUBLISHED;
    loop {
        let report = find(&view, &name).await?;
        let is_decided = |host: &tidegate_api::types::ServiceHost| {
            host.ports.len() == ports || host.problem.is_some()
        };
        if report.hosts.iter().all(is_decided) || Instant::now() >= deadline {
            return Ok((StatusCode::CREATED, Json(report)));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Set how many tasks of a service get connections
#[utoipa::path(
    patch,
    path = "/v1/services/{name}",
    params(("name" = String, Path)),
    request_body = Scale,
    responses(
        (status = 200, body = MeshService),
        (status = 400, body = ErrorBody),
        (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "This host is in no cluster."),
        (status = 413, body = ErrorBody),
        (status = 503, body = ErrorBody, description = "etcd does not answer.")
    )
)]
pub(super) async fn scale(
    State(view): State<Arc<View>>,
    name: Named,
    body: Body,
) -> Result<Json<MeshService>, Problem> {
    let (name, Scale { replicas }) = (text(name)?, json(body)?);
    send(&view.orders, |done| Order::ScaleService { name: name.clone(), replicas, done }).await?;
    find(&view, &name).await.map(Json)
}

/// Remove a service
///
/// Its tasks stay attached.
#[utoipa::path(
    delete,
    path = "/v1/services/{name}",
    params(("name" = String, Path)),
    responses(
        (status = 204),
        (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "This host is in no cluster."),
        (status = 503, body = ErrorBody, description = "etcd does not answer.")
    )
)]
pub(super) async fn remove(
    State(view): State<Arc<View>>,
    name: Named,
) -> Result<StatusCode, Problem> {
    let name = text(name)?;
    send(&view.orders, |done| Order::RemoveService { name, done }).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn find(view: &View, name: &str) -> Result<MeshService, Problem> {
    let all = send(&view.orders, |done| Order::Services { done }).await?;
    let found = all.into_iter().find(|service| service.name == name);
    found.ok_or_else(|| Problem::not_found(&format!("there is no service {name} in the cluster")))
}

fn service_of(new: NewMeshService) -> Result<(String, Service), Problem> {
    let name = parse_name(&new.name)?.to_string();
    let mut ports = Vec::new();
    for text in &new.ports {
        let spec: PortSpec = text.parse().map_err(|error| Problem::bad_request(&error))?;
        for mapping in spec.mappings() {
            let (None, HostPort::Fixed(published)) = (mapping.host_ip, mapping.host_port) else {
                return Err(Problem::bad_request(&format!(
                    "port {text}: every host publishes the port of a service at all of its addresses; use PORT:PORT"
                )));
            };
            let (protocol, target) = (mapping.protocol, mapping.container_port);
            ports.push(ServicePort { protocol, published, target });
        }
    }
    ports.sort();
    let service = Service {
        network: parse_name(&new.network)?.to_string(),
        ports,
        balance: match new.balance {
            Balance::RoundRobin => Method::RoundRobin,
            Balance::LeastConn => Method::LeastConnections,
            Balance::Source => Method::Source,
        },
        prefers_local: new.prefer_local,
        source: match new.source {
            ServiceSource::Client => ClientSource::Client,
            ServiceSource::Proxy => ClientSource::Proxy,
            ServiceSource::ProxyProtocol => ClientSource::ProxyProtocol,
            ServiceSource::ProxyProtocolV1 => ClientSource::ProxyProtocolV1,
        },
        health: new.health.map(health_check),
        drain_s: new.drain_s,
        replicas: new.replicas,
    };
    Ok((name, service))
}

fn health_check(new: HealthCheck) -> record::HealthCheck {
    let HealthCheck { probe, interval_ms, timeout_ms, retries } = new;
    let probe = match probe {
        Probe::Tcp(port) => record::Probe::Tcp(port),
        Probe::Http { port, path } => record::Probe::Http { port, path },
    };
    record::HealthCheck { probe, interval_ms, timeout_ms, retries }
}
