//! A client for the API of a running instance.

use crate::socket::{self, SocketError, explain_connect};
use crate::types::ErrorBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::handshake;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::time::timeout;

/// Timeout of a request.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Maximum size of a response, and of a line of a sequence, in bytes: enough for the maximum number
/// of ports.
const MAX_ANSWER: usize = 128 << 20;

/// Why a request has no usable response.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The path of the socket is unknown.
    #[error(transparent)]
    Path(#[from] SocketError),
    /// The connection failed: no instance is running, or it belongs to another user.
    #[error("{}", explain_connect(.path, .source))]
    Connect {
        /// The path of the socket.
        path: PathBuf,
        /// The error of connect(2).
        source: io::Error,
    },
    /// The instance refused the request.
    #[error("{0}")]
    Refused(String),
    /// The response is late, cut off, too long or not HTTP.
    #[error("socket {}: {what}", .path.display())]
    Response {
        /// The path of the socket.
        path: PathBuf,
        /// What is wrong.
        what: ResponseError,
    },
}

/// What is wrong with a response.
#[derive(Debug, thiserror::Error)]
pub enum ResponseError {
    /// It is late.
    #[error("no response within {TIMEOUT:?}")]
    Timeout,
    /// It is not HTTP, or the connection ended.
    #[error(transparent)]
    Http(#[from] hyper::Error),
    /// It is cut off, or longer than 128 MiB.
    #[error("{0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    /// Its JSON has another form than expected, for instance that of another version.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

/// The name of the daemon where projects are named.
pub const DAEMON: &str = "daemon";

/// The sockets of all instances with a listener.
fn running() -> Result<Vec<(Option<String>, PathBuf)>, SocketError> {
    let mut all = socket::all()?;
    all.retain(|(_, path)| socket::has_listener(path));
    Ok(all)
}

/// A client of one instance.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// A client of the running instance: at `TIDEGATE_SOCKET` if it is set; otherwise the daemon,
    /// or the only project in the foreground.
    ///
    /// # Errors
    /// [`SocketError::NoPlace`], [`SocketError::Several`].
    pub fn new() -> Result<Self, SocketError> {
        let daemon = socket::path(None)?;
        let mut running = running()?.into_iter();
        let path = match (running.next(), running.len()) {
            (None, _) => daemon,
            (Some((None, path)), _) | (Some((_, path)), 0) => path,
            (Some((Some(first), path)), _) => {
                let projects = running.filter_map(|(project, _)| project);
                let projects = std::iter::once(first).chain(projects).collect();
                return Err(SocketError::Several { projects, path });
            }
        };
        Ok(Self { path })
    }

    /// A client of the project `project` in the foreground, or of the daemon (`daemon`).
    ///
    /// # Errors
    /// [`SocketError::NoPlace`].
    pub fn of(project: &str) -> Result<Self, SocketError> {
        Ok(Self { path: socket::path(Some(project).filter(|name| *name != DAEMON))? })
    }

    /// Like [`running`](Self::running). Without one, the client of [`new`](Self::new), whose
    /// requests report that no instance is running.
    ///
    /// # Errors
    /// [`SocketError::NoPlace`].
    pub fn all() -> Result<Vec<Self>, SocketError> {
        let mut all = Self::running()?;
        if all.is_empty() {
            all.push(Self { path: socket::path(None)? });
        }
        Ok(all)
    }

    /// Clients of all running instances of this user, that of the daemon first.
    ///
    /// # Errors
    /// [`SocketError::NoPlace`].
    pub fn running() -> Result<Vec<Self>, SocketError> {
        Ok(running()?.into_iter().map(|(_, path)| Self { path }).collect())
    }

    /// Whether an instance listens on the socket.
    #[must_use]
    pub fn is_running(&self) -> bool {
        socket::has_listener(&self.path)
    }

    /// The path of the socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fetches `target`.
    ///
    /// # Errors
    /// [`ClientError`].
    ///
    /// # Panics
    /// If `target` is not the path of a URL.
    pub async fn get<T: DeserializeOwned>(&self, target: &str) -> Result<T, ClientError> {
        self.send(Method::GET, target, Bytes::new()).await
    }

    /// Posts `body` to `target`.
    ///
    /// # Errors
    /// [`ClientError`].
    ///
    /// # Panics
    /// As for [`get`](Self::get).
    pub async fn post<T: DeserializeOwned>(
        &self,
        target: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).expect("API types can be serialized");
        self.send(Method::POST, target, body.into()).await
    }

    /// Changes `target` by `body`.
    ///
    /// # Errors
    /// [`ClientError`].
    ///
    /// # Panics
    /// As for [`get`](Self::get).
    pub async fn patch<T: DeserializeOwned>(
        &self,
        target: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).expect("API types can be serialized");
        self.send(Method::PATCH, target, body.into()).await
    }

    /// Deletes `target`.
    ///
    /// # Errors
    /// [`ClientError`].
    ///
    /// # Panics
    /// As for [`get`](Self::get).
    pub async fn delete(&self, target: &str) -> Result<(), ClientError> {
        self.send::<Option<()>>(Method::DELETE, target, Bytes::new()).await.map(drop)
    }

    /// Posts `body` to `target` and waits without limit: services start or stop meanwhile.
    ///
    /// # Errors
    /// [`ClientError`].
    ///
    /// # Panics
    /// As for [`get`](Self::get).
    pub async fn post_and_wait<T: DeserializeOwned>(
        &self,
        target: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).expect("API types can be serialized");
        self.send_within(Duration::MAX, Method::POST, target, body.into()).await
    }

    /// Deletes `target` and waits without limit.
    ///
    /// # Errors
    /// [`ClientError`].
    ///
    /// # Panics
    /// As for [`get`](Self::get).
    pub async fn delete_and_wait(&self, target: &str) -> Result<(), ClientError> {
        let deleted =
            self.send_within::<Option<()>>(Duration::MAX, Method::DELETE, target, Bytes::new());
        deleted.await.map(drop)
    }

    /// Fetches `target`, a sequence of JSON values, one per line, and calls `each` for every value
    /// until the sequence ends or `each` fails.
    ///
    /// # Errors
    /// [`ClientError`], or that of `each`.
    ///
    /// # Panics
    /// As for [`get`](Self::get).
    pub async fn lines<T: DeserializeOwned, E: From<ClientError>>(
        &self,
        target: &str,
        mut each: impl FnMut(T) -> Result<(), E>,
    ) -> Result<(), E> {
        let invalid = |what| ClientError::Response { path: self.path.clone(), what };
        let opened =
            timeout(TIMEOUT, open(self.connect().await?, Method::GET, target, Bytes::new()));
        let opened = opened.await.unwrap_or(Err(ResponseError::Timeout));
        let answer = opened.map_err(invalid)?;
        let status = answer.status();
        let mut body = answer.into_body();
        let mut received = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| invalid(ResponseError::Http(error)))?;
            let mut searched = received.len();
            received.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
            if received.len() > MAX_ANSWER {
                return Err(invalid(ResponseError::Body("a line is too long".into())).into());
            }
            if !status.is_success() {
                continue;
            }
            while let Some(end) = received[searched..].iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = received.drain(..=searched + end).collect();
                searched = 0;
                let value = serde_json::from_slice(&line);
                each(value.map_err(|error| invalid(ResponseError::Json(error)))?)?;
            }
        }
        if status.is_success() {
            return Ok(());
        }
        let error = serde_json::from_slice::<ErrorBody>(&received);
        let error = error.map_err(|error| invalid(ResponseError::Json(error)))?.error;
        Err(ClientError::Refused(error).into())
    }

    async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        target: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        self.send_within(TIMEOUT, method, target, body).await
    }

    async fn connect(&self) -> Result<UnixStream, ClientError> {
        let connected = UnixStream::connect(&self.path).await;
        connected.map_err(|source| ClientError::Connect { path: self.path.clone(), source })
    }

    async fn send_within<T: DeserializeOwned>(
        &self,
        limit: Duration,
        method: Method,
        target: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let stream = self.connect().await?;
        let answer = timeout(limit, request(stream, method, target, body)).await;
        let answer = answer.unwrap_or(Err(ResponseError::Timeout));
        let parsed = answer.and_then(|(status, body)| {
            Ok(match status {
                status if status.is_success() && body.is_empty() => {
                    Ok(serde_json::from_slice(b"null")?)
                }
                status if status.is_success() => Ok(serde_json::from_slice(&body)?),
                _ => Err(serde_json::from_slice::<ErrorBody>(&body)?.error),
            })
        });
        match parsed {
            Ok(body) => body.map_err(ClientError::Refused),
            Err(what) => Err(ClientError::Response { path: self.path.clone(), what }),
        }
    }
}

/// Sends a request over `stream`. Returns the status and the body of the response.
async fn request(
    stream: UnixStream,
    method: Method,
    target: &str,
    body: Bytes,
) -> Result<(StatusCode, Bytes), ResponseError> {
    let answer = open(stream, method, target, body).await?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
    Ok((status, body.map_err(ResponseError::Body)?.to_bytes()))
}

/// Sends a request over `stream`. Returns the response, whose body may follow later.
async fn open(
    stream: UnixStream,
    method: Method,
    target: &str,
    body: Bytes,
) -> Result<Response<Incoming>, ResponseError> {
    let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::builder().method(method).uri(target).header("host", "tidegate");
    let request = request.body(Full::new(body)).expect("`target` is a path");
    Ok(sender.send_request(request).await?)
}
