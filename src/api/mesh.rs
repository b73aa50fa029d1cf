//! Handlers of `/v1/mesh`: the cluster of a daemon.

use super::problem::Problem;
use super::request::{Body, Named, json, parse_name, send, text};
use super::view::{Order, View};
use axum::Json;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use serde::Deserialize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tidegate_api::types::{ErrorBody, HostState, Mesh, NewMembership};
use tidegate_control::{EtcdAccess, Membership};

/// Times that the hosts are reported after joining, until all are heard.
const TRIES: u32 = 10;

/// Pause between two of them.
const PAUSE: Duration = Duration::from_millis(50);

/// Options of leaving.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Leaving {
    /// Detach the endpoints on overlay networks, and leave even if etcd does not answer.
    #[serde(default)]
    force: bool,
}

/// The cluster, as this host knows it
#[utoipa::path(
    get,
    path = "/v1/mesh",
    responses(
        (status = 200, body = Mesh),
        (status = 404, body = ErrorBody, description = "This host is in no cluster.")
    )
)]
pub(super) async fn report(State(view): State<Arc<View>>) -> Result<Json<Mesh>, Problem> {
    send(&view.orders, |done| Order::MeshReport { done }).await.map(Json)
}

/// Join a cluster
#[utoipa::path(
    post,
    path = "/v1/mesh",
    request_body = NewMembership,
    responses(
        (status = 201, body = Mesh),
        (status = 400, body = ErrorBody, description = "The address is not one of this host, or a file cannot be read."),
        (status = 409, body = ErrorBody, description = "This host is in a cluster already, its name or address is in use, or this is not a daemon."),
        (status = 413, body = ErrorBody),
        (status = 500, body = ErrorBody),
        (status = 503, body = ErrorBody, description = "etcd does not answer, or rejects the credentials.")
    )
)]
pub(super) async fn join(
    State(view): State<Arc<View>>,
    body: Body,
) -> Result<(StatusCode, Json<Mesh>), Problem> {
    let membership = membership(json::<NewMembership>(body)?)?;
    send(&view.orders, |done| Order::Join { membership, done }).await?;
    let mut report: Mesh;
    let mut tries = 0;
    loop {
        report = send(&view.orders, |done| Order::MeshReport { done }).await?;
        // The first heartbeats of the other hosts arrive after their next interval.
        tries += 1;
        if tries == TRIES || report.hosts.iter().all(|host| host.state != HostState::Silent) {
            return Ok((StatusCode::CREATED, Json(report)));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Leave the cluster
///
/// Without `force`, no endpoint may be attached to an overlay network.
#[utoipa::path(
    delete,
    path = "/v1/mesh",
    params(("force" = Option<bool>, Query)),
    responses(
        (status = 204),
        (status = 400, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "Endpoints are attached, or this host is in no cluster."),
        (status = 500, body = ErrorBody),
        (status = 503, body = ErrorBody, description = "etcd does not answer.")
    )
)]
pub(super) async fn leave(
    State(view): State<Arc<View>>,
    options: Result<Query<Leaving>, axum::extract::rejection::QueryRejection>,
) -> Result<StatusCode, Problem> {
    let options = options.map_err(|rejection| Problem::bad_request(&rejection.body_text()))?;
    let force = options.0.force;
    send(&view.orders, |done| Order::Leave { force, done }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Remove a host that no longer exists from the cluster
#[utoipa::path(
    delete,
    path = "/v1/mesh/hosts/{name}",
    params(("name" = String, Path)),
    responses(
        (status = 204),
        (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "The host is alive, or this host is in no cluster."),
        (status = 503, body = ErrorBody, description = "etcd does not answer.")
    )
)]
pub(super) async fn remove_host(
    State(view): State<Arc<View>>,
    name: Named,
) -> Result<StatusCode, Problem> {
    let host = text(name)?;
    send(&view.orders, |done| Order::RemoveHost { host, done }).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn membership(new: NewMembership) -> Result<Membership, Problem> {
    let path = |path: Option<String>| -> Result<Option<PathBuf>, Problem> {
        match path.map(PathBuf::from) {
            Some(path) if !path.is_absolute() => {
                Err(Problem::bad_request(&format!("{}: not an absolute path", path.display())))
            }
            path => Ok(path),
        }
    };
    if new.etcd.is_empty() {
        return Err(Problem::bad_request(&"no URL of an etcd server"));
    }
    if new.user.is_some() != new.password_file.is_some() {
        return Err(Problem::bad_request(&"a user needs a password file, and the reverse"));
    }
    if new.certificate.is_some() != new.key.is_some() {
        return Err(Problem::bad_request(&"a certificate needs a key, and the reverse"));
    }
    if new.certificate.is_some() && new.authorities.is_none() {
        return Err(Problem::bad_request(
            &"a client certificate needs the certificates of the authorities of the servers",
        ));
    }
    let address = new.advertise.to_canonical();
    if address.is_unspecified() || address.is_loopback() || address.is_multicast() {
        return Err(Problem::bad_request(&format!(
            "{address} is not an address at which other hosts reach this one"
        )));
    }
    Ok(Membership {
        host: parse_name(&new.host)?,
        advertise: address,
        etcd: EtcdAccess {
            servers: new.etcd,
            user: new.user,
            password_file: path(new.password_file)?,
            authorities: path(new.authorities)?,
            certificate: path(new.certificate)?,
            key: path(new.key)?,
        },
    })
}
