//! The server in this process, over its socket: protocol, limits and slow readers. Services in real
//! namespaces are in `tests/supervisor_process.rs`.

use super::*;
use crate::log::{LogLine, OutputStream};
use crate::process::Directory;
use crate::wire::ReceiveError;
use crate::wire::{LOCK, SOCKET, VERSION};
use crate::{LogStream, RemoteError, RemoteSpec, RemoteSupervisor};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use tempfile::TempDir;
use tidegate_model::Restart;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Timeout of operations that usually complete immediately.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A server in this process for services `db` and `web`, whose init cannot run.
struct Bed {
    server: Arc<Server>,
    serving: JoinHandle<()>,
    /// Stops the services on drop.
    _stop: oneshot::Sender<()>,
    directory: Directory,
    run_dir: TempDir,
}

impl Bed {
    fn new() -> Self {
        let run_dir = tempfile::tempdir().unwrap();
        let path = run_dir.path().join("project");
        let directory = Directory::claim(&path).unwrap();
        let listener = directory.listen().unwrap();
        let namespace = Namespace::current().unwrap();
        let namespaces = ["db", "web"].map(|name| (name.to_owned(), namespace.clone()));
        let mut server = Server::new(path, namespaces.into());
        server.init = PathBuf::from("/nonexistent/init");
        let server = Arc::new(server);
        let (stop, stopped) = oneshot::channel();
        let serving = tokio::spawn(Arc::clone(&server).serve(listener, stopped));
        Self { server, serving, _stop: stop, directory, run_dir }
    }

    fn path(&self) -> PathBuf {
        self.run_dir.path().join("project")
    }

    async fn client(&self) -> RemoteSupervisor {
        RemoteSupervisor::connect(&self.path()).await.unwrap().unwrap()
    }

    fn write(&self, service: &str, text: &str) {
        self.server.log.append(service, OutputStream::Stdout, std::iter::once(text.to_owned()));
    }

    async fn connection(&self) -> UnixStream {
        UnixStream::connect(self.path().join(SOCKET)).await.unwrap()
    }

    /// Sends `message` and returns the first reply.
    async fn ask(&self, message: &[u8]) -> Result<Reply, ReceiveError> {
        let mut stream = self.connection().await;
        stream.write_all(message).await.unwrap();
        within(receive_message(&mut Inbox::default(), &mut stream)).await
    }
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(test);
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(TIMEOUT, future).await.expect("no result in time")
}

/// The next `count` lines.
async fn texts(stream: &mut LogStream, count: usize) -> Vec<String> {
    let mut texts = Vec::new();
    while texts.len() < count {
        texts.push(within(stream.next()).await.expect("the log has ended").text);
    }
    texts
}

async fn rest(stream: &mut LogStream) -> Vec<LogLine> {
    let mut lines = Vec::new();
    while let Some(line) = within(stream.next()).await {
        lines.push(line);
    }
    lines
}

fn spec(name: &str) -> RemoteSpec {
    RemoteSpec {
        name: name.to_owned(),
        command: vec!["true".to_owned()],
        environment: [].into(),
        hostname: name.to_owned(),
        working_dir: "/".into(),
        hosts: String::new(),
        resolv_conf: String::new(),
        restart: Restart::OnFailure { max: Some(3) },
        depends_on: vec![],
    }
}

/// A message of `json` with its length.
fn message(json: &str) -> Vec<u8> {
    let length = u32::try_from(json.len()).unwrap().to_le_bytes();
    [&length[..], json.as_bytes()].concat()
}

fn error<T>(result: Result<T, RemoteError>) -> String {
    result.err().expect("no error").to_string()
}

#[test]
fn a_client_learns_process_id_and_namespaces() {
    run(async {
        let bed = Bed::new();
        let client = bed.client().await;
        assert_eq!(client.pid(), std::process::id());
        assert_eq!(client.namespaces().keys().collect::<Vec<_>>(), ["db", "web"]);
        for path in client.namespaces().values() {
            let namespace = Namespace::from_path(path).unwrap();
            assert_eq!(namespace.id(), Namespace::current().unwrap().id());
        }
        assert!(!client.is_started().await.unwrap());
    });
}

#[test]
fn nobody_serves_a_directory_without_process() {
    run(async {
        let bed = Bed::new();
        let client = bed.client().await;
        let path = bed.path();
        let missing = RemoteSupervisor::connect(Path::new("/nonexistent/directory")).await;
        assert!(missing.unwrap().is_none());
        // As if it was killed: the files remain, without listener and lock.
        bed.serving.abort();
        let _ = bed.serving.await;
        drop(bed.server);
        let holder = std::fs::read_to_string(path.join(LOCK)).unwrap();
        assert_eq!(holder.trim(), std::process::id().to_string());
        std::fs::remove_file(path.join(LOCK)).unwrap();
        std::fs::write(path.join(LOCK), holder).unwrap();
        drop(bed.directory);
        assert!(path.join(SOCKET).exists(), "files of a replaced directory are kept");
        assert!(RemoteSupervisor::connect(&path).await.unwrap().is_none());
        assert!(error(client.is_started().await).contains("has ended"));
        client.stop().await.unwrap();

        let directory = Directory::claim(&path).unwrap();
        let listener = directory.listen().expect("the stale socket is replaced");
        let server = Arc::new(Server::new(path.clone(), BTreeMap::new()));
        tokio::spawn(server.serve(listener, std::future::pending::<()>()));
        assert!(RemoteSupervisor::connect(&path).await.unwrap().is_some());
    });
}

#[test]
fn the_directory_is_private_locked_and_removed() {
    run(async {
        let run_dir = tempfile::tempdir().unwrap();
        let path = run_dir.path().join("a/b");
        let directory = Directory::claim(&path).unwrap();
        let _listener = directory.listen().unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(&path.join(SOCKET))), (0o700, 0o600));
        let held = Directory::claim(&path).unwrap_err();
        assert_eq!(held, Failure::Running(Some(std::process::id())));
        drop(directory);
        assert!(!path.exists());

        // An existing directory stays, as do files of others in it, but others lose access.
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::write(path.join("other"), "").unwrap();
        let directory = Directory::claim(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
        drop(directory);
        let left: Vec<_> =
            path.read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["other"]);

        let link = run_dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(Directory::claim(&link), Err(Failure::Other(_))));
    });
}

#[test]
fn a_process_without_its_socket_is_waited_for() {
    run(async {
        let run_dir = tempfile::tempdir().unwrap();
        let directory = Directory::claim(run_dir.path()).unwrap();
        let connecting = tokio::spawn({
            let path = run_dir.path().to_owned();
            async move { RemoteSupervisor::connect(&path).await }
        });
        sleep(Duration::from_millis(200)).await;
        assert!(!connecting.is_finished());
        let server = Arc::new(Server::new(run_dir.path().to_owned(), BTreeMap::new()));
        tokio::spawn(server.serve(directory.listen().unwrap(), std::future::pending::<()>()));
        assert!(within(connecting).await.unwrap().unwrap().is_some());
    });
}

#[test]
fn a_failed_start_is_reported_and_can_be_repeated() {
    run(async {
        let bed = Bed::new();
        let client = bed.client().await;
        let grace = Duration::from_secs(1);
        let unknown = error(client.start(vec![spec("cache")], grace).await);
        assert!(unknown.contains("has no service \"cache\""), "{unknown}");
        let cyclic = RemoteSpec { depends_on: vec!["web".to_owned()], ..spec("web") };
        let cyclic = error(client.start(vec![cyclic], grace).await);
        assert!(cyclic.contains("dependency cycle"), "{cyclic}");
        for _ in 0..2 {
            let failed = error(client.start(vec![spec("db"), spec("web")], grace).await);
            assert!(failed.starts_with("service \"db\": "), "{failed}");
        }
        assert!(!client.is_started().await.unwrap());
        let statuses = client.statuses().await.unwrap().next().await.unwrap();
        let names: Vec<_> = statuses.iter().map(|status| status.name.as_str()).collect();
        assert_eq!(names, ["db"], "the list of the last start");
    });
}

#[test]
fn logs_have_tail_filter_and_order() {
    run(async {
        let bed = Bed::new();
        let client = bed.client().await;
        for (service, text) in [("db", "1"), ("web", "2"), ("db", "3"), ("web", "4")] {
            bed.write(service, text);
        }
        let mut all = client.logs(None, usize::MAX, false).await.unwrap();
        assert!(!all.is_complete());
        let lines = rest(&mut all).await;
        assert!(all.is_complete());
        let read: Vec<_> = lines.iter().map(|line| (&*line.service, &*line.text)).collect();
        assert_eq!(read, [("db", "1"), ("web", "2"), ("db", "3"), ("web", "4")]);
        assert!(lines[0].time.elapsed().unwrap() < TIMEOUT);

        let mut web = client.logs(Some("web"), 1, true).await.unwrap();
        assert_eq!(texts(&mut web, 1).await, ["4"]);
        bed.write("db", "5");
        bed.write("web", "6");
        assert_eq!(texts(&mut web, 1).await, ["6"]);

        let mut new = client.logs(None, 0, true).await.unwrap();
        bed.write("db", "7");
        assert_eq!(texts(&mut new, 1).await, ["7"]);
        let unknown = error(client.logs(Some("cache"), 1, false).await.map(|_| ()));
        assert!(unknown.contains("has no service \"cache\""), "{unknown}");
    });
}

#[test]
fn streams_get_their_last_messages_when_the_services_have_ended() {
    run(async {
        let bed = Bed::new();
        let client = bed.client().await;
        let mut log = client.logs(None, 0, true).await.unwrap();
        let mut statuses = client.statuses().await.unwrap();
        assert_eq!(statuses.next().await, Some(vec![]));
        for number in 0..1000 {
            bed.write("web", &number.to_string());
        }
        let stop = encode_message(&Request::Stop).unwrap();
        assert!(matches!(bed.ask(&stop).await, Ok(Reply::Done)));
        assert_eq!(rest(&mut log).await.len(), 1000);
        assert!(log.is_complete());
        while let Some(statuses) = within(statuses.next()).await {
            assert_eq!(statuses, []);
        }
        within(bed.serving).await.unwrap();
    });
}

#[test]
fn a_follower_that_does_not_read_is_disconnected_and_blocks_nothing() {
    run(async {
        let bed = Bed::new();
        let client = bed.client().await;
        let mut slow = client.logs(None, 0, true).await.unwrap();
        let mut quick = client.logs(Some("db"), 0, true).await.unwrap();
        // More than the log and the socket hold.
        for _ in 0..400 {
            let lines = (0..10).map(|_| "x".repeat(1000));
            within(async {
                bed.server.log.append("web", OutputStream::Stdout, lines);
                tokio::task::yield_now().await;
            })
            .await;
        }
        bed.write("db", "other services are read");
        assert_eq!(texts(&mut quick, 1).await, ["other services are read"]);
        // It is disconnected without any further line.
        within(async {
            while bed.server.log_readers.available_permits() < MAX_LOG_READERS - 1 {
                sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        let read = rest(&mut slow).await.len();
        assert!(read < 4000 && !slow.is_complete(), "{read}");
    });
}

#[test]
fn a_follower_that_reads_slowly_sees_no_gap() {
    run(async {
        let bed = Bed::new();
        let client = bed.client().await;
        let mut log = client.logs(None, 0, true).await.unwrap();
        let mut next = 0;
        for number in 0..50_000 {
            bed.write("web", &format!("{number:0>200}"));
            if number % 10 == 0 {
                let Some(line) = within(log.next()).await else { break };
                assert_eq!(line.text.parse::<usize>().unwrap(), next);
                next += 1;
            }
        }
        for line in rest(&mut log).await {
            assert_eq!(line.text.parse::<usize>().unwrap(), next);
            next += 1;
        }
        assert!(!log.is_complete() && next < 50_000, "{next}");
    });
}

#[test]
fn connections_are_limited() {
    run(async {
        let bed = Bed::new();
        let client = bed.client().await;
        let mut idle = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            idle.push(bed.connection().await);
        }
        let refused = error(client.is_started().await);
        assert!(refused.contains("too many connections"), "{refused}");
        // Connections without a request end.
        let began = tokio::time::Instant::now();
        let mut byte = [0; 1];
        assert_eq!(within(idle[0].read(&mut byte)).await.unwrap(), 0);
        assert!(began.elapsed() < 2 * REQUEST_TIMEOUT);
        sleep(Duration::from_millis(100)).await;
        assert!(!client.is_started().await.unwrap());
    });
}

#[test]
fn readers_of_logs_leave_connections_for_others() {
    run(async {
        let bed = Bed::new();
        let client = bed.client().await;
        let mut readers = Vec::new();
        for _ in 0..MAX_LOG_READERS {
            readers.push(client.logs(None, 0, true).await.unwrap());
        }
        let refused = error(client.logs(None, 0, true).await.map(|_| ()));
        assert!(refused.contains("too many readers of logs"), "{refused}");
        assert!(!client.is_started().await.unwrap());
        readers.pop();
        within(async {
            while client.logs(None, 0, true).await.is_err() {
                sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    });
}

#[test]
fn an_unknown_version_is_one_clear_error() {
    run(async {
        let bed = Bed::new();
        let newer = bed.ask(&message(r#"{"version":2,"message":{"Restart":["web"]}}"#)).await;
        assert!(matches!(newer, Ok(Reply::Failed(Failure::Version))), "{newer:?}");

        // A process of another version.
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join(SOCKET)).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(&message(r#"{"version":9,"message":"New"}"#)).await.unwrap();
        });
        let other = error(RemoteSupervisor::connect(directory.path()).await);
        assert!(other.contains("another version of tidegate"), "{other}");
        assert_eq!(VERSION, 1);
    });
}

#[test]
fn invalid_requests_are_rejected() {
    run(async {
        let bed = Bed::new();
        for invalid in [r#"{"version":1,"message":"Unknown"}"#, r#"{"message":"Stop"}"#, "no JSON"]
        {
            let reply = bed.ask(&message(invalid)).await;
            assert!(matches!(reply, Ok(Reply::Failed(Failure::Other(_)))), "{invalid}: {reply:?}");
        }
        let too_long = bed.ask(&u32::MAX.to_le_bytes()).await;
        let Ok(Reply::Failed(Failure::Other(reason))) = too_long else { panic!("{too_long:?}") };
        assert!(reason.contains("the maximum is 8388608"), "{reason}");
        assert!(!bed.serving.is_finished());
    });
}

#[test]
fn a_request_that_is_too_long_is_an_error_of_the_client() {
    run(async {
        let bed = Bed::new();
        let long = RemoteSpec { hosts: "x".repeat(9 << 20), ..spec("web") };
        let failed = error(bed.client().await.start(vec![long], Duration::ZERO).await);
        assert!(failed.contains("the maximum is 8 MiB") && failed.lines().count() == 1, "{failed}");
    });
}

#[test]
fn specs_survive_the_transfer() {
    for restart in [
        Restart::No,
        Restart::OnFailure { max: None },
        Restart::OnFailure { max: Some(2) },
        Restart::Always,
        Restart::UnlessStopped,
    ] {
        let spec = RemoteSpec { restart, ..spec("web") };
        let json = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<RemoteSpec>(&json).unwrap(), spec);
    }
}
