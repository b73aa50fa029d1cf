//! Detaches tasks without cutting their connections.

use super::health::connections;
use super::{Instance, Member};
use crate::api::{Order, Problem};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tidegate_control::{Command, Name};
use tidegate_model::Protocol;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

/// Time for connections to arrive that were begun before all hosts have noticed.
const ARRIVAL: Duration = Duration::from_millis(50);

/// Interval at which the connections of a task are counted.
const COUNT: Duration = Duration::from_millis(50);

impl Instance {
    /// Begins to drain `endpoint` if it is a task with a drain time: it is detached later by an
    /// order, whose result `done` receives. Otherwise returns `done`.
    pub(in crate::instance) async fn drain(
        &mut self,
        endpoint: &Name,
        done: oneshot::Sender<Result<(), Problem>>,
    ) -> Option<oneshot::Sender<Result<(), Problem>>> {
        let (state, text) = (self.owner.state(), endpoint.to_string());
        let Member::Yes(mesh) = &mut self.member else { return Some(done) };
        let task = state.endpoints().get(endpoint).and_then(|endpoint| endpoint.task.as_ref());
        let view = &mesh.cluster.borrow().view.clone();
        let service = task.and_then(|task| view.services.get(&task.service));
        let namespace = self.up.publisher.namespace(&text);
        let (Some(service), Some(namespace)) = (service, namespace) else { return Some(done) };
        if mesh.health.is_draining(&text) {
            let problem = Problem::conflict(&format!("endpoint {text} is being detached already"));
            drop(done.send(Err(problem)));
            return None;
        }
        if service.drain_s == 0 {
            return Some(done);
        }
        mesh.health.drain(&text, true);
        let tcp = service.ports.iter().filter(|port| port.protocol == Protocol::Tcp);
        let ports: BTreeSet<u16> = tcp.map(|port| port.target).collect();
        let deadline = Instant::now() + Duration::from_secs(service.drain_s.into());
        let records = state.endpoints().get(endpoint).map(|known| mesh.records(&state, known));
        let agent = Arc::clone(&mesh.agent);
        let (orders, endpoint) = (self.own_orders.clone(), endpoint.clone());
        tokio::spawn(async move {
            // Without the store, it is not detached either, and this is the answer.
            for ((network, name), record) in records.into_iter().flatten() {
                let _ = agent.claim(&network, &name, record).await;
            }
            if agent.noticed().await.is_err() {
                tracing::warn!(%endpoint, "a host has not noticed in time that the task is detached");
            }
            sleep(ARRIVAL).await;
            // Twice, because a connection may have begun in between.
            let mut empty = 0;
            while Instant::now() < deadline && empty < 2 {
                let count = connections(&namespace, &ports);
                empty = if count == 0 { empty + 1 } else { 0 };
                sleep(COUNT).await;
            }
            // The instance has ended if nobody receives it.
            let _ = orders.send(Order::Drained { endpoint, done }).await;
        });
        None
    }

    /// Detaches a task that was drained.
    ///
    /// # Errors
    /// It was detached already, or etcd does not answer.
    pub(in crate::instance) async fn drained(&mut self, endpoint: &Name) -> Result<(), Problem> {
        let detached = self.command(&Command::Detach(endpoint.clone()), Default::default()).await;
        if let Member::Yes(mesh) = &mut self.member {
            mesh.health.drain(&endpoint.to_string(), false);
        }
        if detached.is_err() {
            self.sync_endpoints().await;
        }
        detached
    }
}
