//! Log events and the table on standard output once a project is up.

use super::{Instance, Running};
use crate::table::table;
use anyhow::bail;
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::mpsc;
use std::time::Duration;
use tidegate_model::PublishLabel;
use tidegate_netsetup::Desired;
use tidegate_publish::bind::runs;

/// Maximum wait until the table is written, so that it precedes the output of services.
const WRITE_TIMEOUT: Duration = Duration::from_millis(500);

impl Instance {
    /// Prints on standard output that the daemon is up, and how to use it.
    ///
    /// # Errors
    /// Standard output is closed, or its reader does not read.
    pub(super) fn announce_daemon(&self) -> anyhow::Result<()> {
        let Desired { networks, endpoints, .. } = &self.up.layout.desired;
        let text = format!(
            "tidegate daemon is up with {} networks and {} endpoints. Add more with tidegate network create NAME and \
             tidegate attach.\n",
            networks.len(),
            endpoints.len()
        );
        print(text)
    }
}

/// Writes `text` to standard output. On a separate thread: a write to a full pipe blocks, and must
/// not block signals and the API.
fn print(text: String) -> anyhow::Result<()> {
    let (done, is_done) = mpsc::channel();
    std::thread::Builder::new().name("tidegate-announce".into()).spawn(move || {
        let mut out = std::io::stdout().lock();
        // Fails if the caller has timed out.
        let _ = done.send(out.write_all(text.as_bytes()).and_then(|()| out.flush()));
    })?;
    match is_done.recv_timeout(WRITE_TIMEOUT) {
        Ok(written) => Ok(written?),
        Err(_) => bail!("write timed out"),
    }
}

impl Running {
    /// Logs networks, attachments and published ports.
    pub(super) fn log(&self) {
        for network in &self.layout.desired.networks {
            tracing::info!(network = network.name, bridge = network.bridge.name, "network is up");
        }
        let published = self.published();
        for endpoint in &self.layout.desired.endpoints {
            for attachment in &endpoint.attachments {
                tracing::info!(endpoint = endpoint.name, network = attachment.network, "attached");
            }
            for (publish, to) in
                runs(published.get(&endpoint.name).map(Vec::as_slice).unwrap_or_default())
            {
                tracing::info!(publish, endpoint = endpoint.name, to, "published");
            }
        }
    }

    /// Returns the published ports of each endpoint, each with its container port.
    fn published(&self) -> BTreeMap<String, Vec<(PublishLabel, u16)>> {
        let mut published: BTreeMap<String, Vec<(PublishLabel, u16)>> = BTreeMap::new();
        for port in self.publisher.ports() {
            published.entry(port.endpoint).or_default().push((port.label, port.container_port));
        }
        published
    }

    /// Prints networks, addresses and published ports of each service on standard output.
    ///
    /// # Errors
    /// Standard output is closed, or its reader does not read.
    pub(super) fn announce(&self) -> anyhow::Result<()> {
        let published = self.published();
        let mut rows = vec![["SERVICE", "NETWORK", "ADDRESS", "PUBLISHED"].map(str::to_owned)];
        for endpoint in &self.layout.desired.endpoints {
            let ports = published.get(&endpoint.name).map(Vec::as_slice).unwrap_or_default();
            let ports: Vec<_> =
                runs(ports).into_iter().map(|(from, to)| format!("{from}->{to}")).collect();
            let (mut name, mut ports) = (endpoint.name.clone(), ports.join(", "));
            for attachment in &endpoint.attachments {
                let addresses: Vec<_> =
                    attachment.addresses.iter().map(|net| net.addr().to_string()).collect();
                let (name, ports) = (std::mem::take(&mut name), std::mem::take(&mut ports));
                rows.push([name, attachment.network.clone(), addresses.join(", "), ports]);
            }
        }
        let text = table(&rows) + "Ctrl-C takes all of it down again.\n";
        print(text)
    }
}
