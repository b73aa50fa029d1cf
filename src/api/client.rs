//! Asks an instance that runs.

use super::socket::{self, explain_connect};
use super::types::ErrorBody;
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

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// The most that an answer may be, in bytes: as many ports as there may be, and more.
const MAX_ANSWER: usize = 128 << 20;

/// The way to an instance.
#[derive(Debug)]
pub(crate) struct Client {
    path: PathBuf,
}

impl Client {
    /// To the instance whose socket `TIDEGATE_SOCKET` names, or the usual one.
    ///
    /// # Errors
    /// There is no usual one.
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self { path: socket::path()? })
    }

    /// What it says at `target`.
    ///
    /// # Errors
    /// One line: nobody is there, or it says no.
    pub(crate) async fn get<T: DeserializeOwned>(&self, target: &str) -> anyhow::Result<T> {
        let socket = || format!("socket {}", self.path.display());
        match timeout(PATIENCE, self.ask(target)).await {
            Ok(answer) => serde_json::from_slice(&answer?).with_context(socket),
            Err(_) => bail!("socket {}: no answer within {PATIENCE:?}", self.path.display()),
        }
    }

    async fn ask(&self, target: &str) -> anyhow::Result<Bytes> {
        let socket = || format!("socket {}", self.path.display());
        let stream = UnixStream::connect(&self.path)
            .await
            .map_err(|error| anyhow!(explain_connect(&self.path, &error)))?;
        let (mut sender, connection) =
            handshake(TokioIo::new(stream)).await.with_context(socket)?;
        tokio::spawn(connection);
        let request = Request::get(target).header("host", "tidegate").body(Empty::<Bytes>::new())?;
        let answer = sender.send_request(request).await.with_context(socket)?;
        let well = answer.status().is_success();
        let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
        let body = body.map_err(|error| anyhow!("{}: {error}", socket()))?.to_bytes();
        if !well {
            let error: ErrorBody = serde_json::from_slice(&body).with_context(socket)?;
            bail!("{}", error.error);
        }
        Ok(body)
    }
}
