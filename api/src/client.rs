//! A client for the API of a running instance.

use crate::socket::{self, explain_connect};
use crate::types::ErrorBody;
use anyhow::{Context, anyhow, bail};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1::handshake;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::time::timeout;

/// The longest wait for a response.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The largest accepted response, in bytes: enough for the maximum number of ports.
const MAX_ANSWER: usize = 128 << 20;

/// A client of one instance.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// A client for the socket in `TIDEGATE_SOCKET`, or for the default one.
    ///
    /// # Errors
    /// Without a default socket.
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self { path: socket::path()? })
    }

    /// Fetches `target`.
    ///
    /// # Errors
    /// One line: the instance is not running, or the error of its response.
    pub async fn get<T: DeserializeOwned>(&self, target: &str) -> anyhow::Result<T> {
        let socket = || format!("socket {}", self.path.display());
        match timeout(TIMEOUT, self.request(target)).await {
            Ok(answer) => serde_json::from_slice(&answer?).with_context(socket),
            Err(_) => bail!("socket {}: no response within {TIMEOUT:?}", self.path.display()),
        }
    }

    async fn request(&self, target: &str) -> anyhow::Result<Bytes> {
        let socket = || format!("socket {}", self.path.display());
        let stream = UnixStream::connect(&self.path)
            .await
            .map_err(|error| anyhow!(explain_connect(&self.path, &error)))?;
        let (mut sender, connection) =
            handshake(TokioIo::new(stream)).await.with_context(socket)?;
        tokio::spawn(connection);
        let request = Request::get(target).header("host", "tidegate").body(Empty::<Bytes>::new())?;
        let answer = sender.send_request(request).await.with_context(socket)?;
        let is_success = answer.status().is_success();
        let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
        let body = body.map_err(|error| anyhow!("{}: {error}", socket()))?.to_bytes();
        if !is_success {
            let error: ErrorBody = serde_json::from_slice(&body).with_context(socket)?;
            bail!("{}", error.error);
        }
        Ok(body)
    }
}
