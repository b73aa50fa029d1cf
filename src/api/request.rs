//! Parts of requests, converted from the types of the API.

use super::problem::Problem;
use axum::body::Bytes;
use axum::extract::Path;
use axum::extract::rejection::{BytesRejection, PathRejection};
use axum::http::StatusCode;
use serde::de::DeserializeOwned;
use tidegate_api::types::{NewAttachment, NewNetwork};
use tidegate_control::{Name, NetworkAttachment, NetworkSpec};
use tidegate_publish::publisher::PublishError;
use tokio::sync::{mpsc, oneshot};

/// Maximum size of a request body in bytes, about a hundred times the size of a valid one.
pub(super) const MAX_BODY: usize = 64 << 10;

pub(super) type Named = Result<Path<String>, PathRejection>;
pub(super) type Body = Result<Bytes, BytesRejection>;

/// Sends an order to the task that executes it, and waits for its result.
pub(super) async fn send<O, T>(
    orders: &mpsc::Sender<O>,
    order: impl FnOnce(oneshot::Sender<Result<T, Problem>>) -> O,
) -> Result<T, Problem> {
    let (done, is_done) = oneshot::channel();
    let closed = || Problem::from(PublishError::Closed);
    orders.send(order(done)).await.map_err(|_| closed())?;
    is_done.await.map_err(|_| closed())?
}

pub(super) fn parse_name(name: &str) -> Result<Name, Problem> {
    Name::new(None, name).map_err(|_| {
        Problem::bad_request(&format!(
            "invalid name {name:?}: use 1 to 63 letters, digits, dots, hyphens and underscores, \
             with a letter or digit first"
        ))
    })
}

pub(super) fn network_spec(new: NewNetwork) -> Result<NetworkSpec, Problem> {
    if new.encrypted {
        return Err(Problem::bad_request(&format!(
            "network {}: encryption is not supported, and would not be checked by anyone; let WireGuard carry the packets \
             between the hosts instead (docs/mesh.md)",
            new.name
        )));
    }
    let subnets: Vec<_> = new.subnets.iter().map(|one| (one.subnet, one.gateway)).collect();
    let has_v6 = subnets.iter().any(|(subnet, _)| subnet.addr().is_ipv6());
    Ok(NetworkSpec {
        subnets,
        ipv6: new.ipv6 || has_v6,
        internal: new.internal,
        inter_container: !new.isolated,
        mtu: new.mtu,
        bridge: new.bridge,
        dns: new.dns,
        names_at_gateway: new.dns_at_gateway,
        ..NetworkSpec::new(parse_name(&new.name)?)
    })
}

pub(super) fn attachment(new: &NewAttachment) -> Result<NetworkAttachment, Problem> {
    Ok(NetworkAttachment {
        addresses: new.addresses.clone(),
        aliases: new.aliases.clone(),
        any_source: new.any_source,
        ..NetworkAttachment::new(parse_name(&new.network)?)
    })
}

/// The name in the path.
pub(super) fn text(name: Named) -> Result<String, Problem> {
    name.map(|Path(name)| name)
        .map_err(|rejection| Problem::of(rejection.status(), &rejection.body_text()))
}

/// The body as JSON, regardless of its `Content-Type`; `curl -d` sends another type.
pub(super) fn json<T: DeserializeOwned>(body: Body) -> Result<T, Problem> {
    let body = body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            Problem::of(rejection.status(), &format!("request body exceeds {MAX_BODY} bytes"))
        }
        status => Problem::of(status, &rejection.body_text()),
    })?;
    serde_json::from_slice(&body)
        .map_err(|error| Problem::bad_request(&format!("request body: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_api::types::NewPorts;

    #[test]
    fn an_invalid_body_is_rejected_with_the_reason() {
        let line =
            |body: &str| json::<NewPorts>(Ok(Bytes::from(body.to_owned()))).unwrap_err().line;
        assert!(line("").starts_with("request body: EOF"), "{}", line(""));
        assert!(line(r#"{"endpoint":"web"}"#).contains("missing field `spec`"));
        assert!(
            line(r#"{"endpoint":"web","spec":"80","port":1}"#).contains("unknown field `port`")
        );
    }
}
