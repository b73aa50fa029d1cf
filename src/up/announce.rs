//! What is told on standard output once a project is up.

use super::Running;
use crate::ports::runs;
use crate::table::table;
use std::collections::BTreeMap;
use std::io::Write;
use tidegate_model::PublishLabel;

impl Running {
    /// Tells what is there.
    pub(super) fn announce(&self) -> anyhow::Result<()> {
        let mut published: BTreeMap<String, Vec<(PublishLabel, u16)>> = BTreeMap::new();
        for port in self.publisher.ports() {
            published.entry(port.endpoint).or_default().push((port.label, port.container_port));
        }
        let mut rows = vec![["SERVICE", "NETWORK", "ADDRESS", "PUBLISHED"].map(str::to_owned)];
        for endpoint in &self.layout.desired.endpoints {
            let ports = published.get(&endpoint.name).map(Vec::as_slice).unwrap_or_default();
            let ports: Vec<_> = runs(ports).into_iter().map(|(from, to)| format!("{from}->{to}")).collect();
            let (mut name, mut ports) = (endpoint.name.clone(), ports.join(", "));
            for attachment in &endpoint.attachments {
                let addresses: Vec<_> =
                    attachment.addresses.iter().map(|net| net.addr().to_string()).collect();
                let (name, ports) = (std::mem::take(&mut name), std::mem::take(&mut ports));
                rows.push([name, attachment.network.clone(), addresses.join(", "), ports]);
            }
        }
        let mut out = std::io::stdout().lock();
        out.write_all(table(&rows).as_bytes())?;
        writeln!(out, "Ctrl-C takes all of it down again.")?;
        Ok(out.flush()?)
    }
}
