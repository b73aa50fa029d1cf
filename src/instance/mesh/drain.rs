//! Detaches tasks without cutting their connections.

use super::health::connections;
use super::{Instance, Member};
use crate::api::{Order, Problem};
use std::collections::BTreeSet;
use std::time::Duration;
use tidegate_control::{Command, Name};
use tidegate_model::Protocol;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

/// Time for all hosts to learn that a task gets no new connections.
const NOTICE: Duration = Duration::from_millis(200);

/// Interval at which the connections of a task are counted.
const COUNT: Duration = Duration::from_millis(100);

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
        self.sync_endpoints().await;
        let (orders, endpoint) = (self.own_orders.clone(), endpoint.clone());
        tokio::spawn(async move {
            sleep(NOTICE).await;
            while Instant::now() < deadline && connections(&namespace, &ports) > 0 {
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
