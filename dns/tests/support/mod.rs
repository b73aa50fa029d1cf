//! A test host with a resolver, containers and upstream servers.

#![allow(dead_code, reason = "every test crate uses a part of it")]

pub(crate) mod client;
pub(crate) mod upstream;

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tidegate_dns::{EndpointSpec, NetworkSpec, Resolver, ResolverSettings, ServeOptions, Serving};
use tidegate_netns as netns;
use tidegate_testbed::Namespace;
use tokio::runtime::Runtime;
use upstream::Upstream;

/// Converts a namespace of the test bed to that of the product.
pub(crate) fn handle(namespace: &Namespace) -> netns::Namespace {
    netns::Namespace::from_path(&namespace.path()).unwrap()
}

/// A host whose `resolv.conf` names servers in its own namespace.
pub(crate) struct TestBed {
    // Servers are dropped before their runtime.
    pub(crate) resolver: Arc<Resolver>,
    pub(crate) host: Namespace,
    pub(crate) directory: TempDir,
    pub(crate) runtime: Runtime,
}

impl TestBed {
    /// With one upstream server, which responds.
    pub(crate) fn with_upstream() -> (Self, Upstream) {
        let host = Namespace::new();
        let upstream = Upstream::start(&host, "127.0.0.53:53");
        (Self::new(host, "nameserver 127.0.0.53\n"), upstream)
    }

    pub(crate) fn new(host: Namespace, resolv_conf: &str) -> Self {
        Self::with(host, resolv_conf, |_| ())
    }

    pub(crate) fn with(
        host: Namespace,
        resolv_conf: &str,
        change: impl FnOnce(&mut ResolverSettings),
    ) -> Self {
        tidegate_testbed::raise_open_files(1 << 16);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("resolv.conf");
        fs::write(&path, resolv_conf).unwrap();
        let mut settings =
            ResolverSettings { resolv_conf: path, ..ResolverSettings::new(handle(&host)) };
        change(&mut settings);
        let guard = runtime.enter();
        let resolver = Arc::new(Resolver::new(settings).unwrap());
        drop(guard);
        Self { resolver, host, directory, runtime }
    }

    pub(crate) fn resolv_conf(&self) -> PathBuf {
        self.directory.path().join("resolv.conf")
    }

    pub(crate) fn network(&self, name: &str) {
        self.network_with(&NetworkSpec { name: name.to_owned(), ..NetworkSpec::default() });
    }

    pub(crate) fn internal_network(&self, name: &str) {
        self.network_with(&NetworkSpec {
            name: name.to_owned(),
            internal: true,
            ..NetworkSpec::default()
        });
    }

    pub(crate) fn network_with(&self, spec: &NetworkSpec) {
        self.resolver.add_network(spec).unwrap();
    }

    pub(crate) fn endpoint(
        &self,
        network: &str,
        container: &str,
        aliases: &[&str],
        addresses: &[&str],
    ) {
        self.resolver.add_endpoint(network, &endpoint(container, aliases, addresses)).unwrap();
    }

    /// Serves a container with a new namespace.
    pub(crate) fn serve(&self, container: &str) -> Container {
        self.serve_with(container, &ServeOptions::default())
    }

    pub(crate) fn serve_with(&self, container: &str, options: &ServeOptions) -> Container {
        let namespace = Namespace::new();
        let _guard = self.runtime.enter();
        let serving = self.resolver.serve(&handle(&namespace), container, options).unwrap();
        Container { namespace, serving: Some(serving) }
    }

    /// The metrics page.
    pub(crate) fn page(&self) -> String {
        let mut page = String::new();
        self.resolver.describe(&mut page).unwrap();
        page
    }
}

/// A container with a server.
pub(crate) struct Container {
    pub(crate) namespace: Namespace,
    pub(crate) serving: Option<Serving>,
}

pub(crate) fn endpoint(container: &str, aliases: &[&str], addresses: &[&str]) -> EndpointSpec {
    EndpointSpec {
        container: container.to_owned(),
        name: container.to_owned(),
        aliases: aliases.iter().map(ToString::to_string).collect(),
        hostname: None,
        addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
    }
}

pub(crate) fn at(address: &str) -> SocketAddr {
    address.parse().unwrap()
}

pub(crate) const SOON: Duration = Duration::from_secs(5);
