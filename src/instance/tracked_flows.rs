//! Limits the share of containers in the conntrack table.

use std::io;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tidegate_model::LogInterval;
use tidegate_netns::Namespace;
use tidegate_netsetup::{EvictedFlows, Firewall};

/// Interval between checks. At 10,000 new flows per second, a quarter of a table of 262,144 entries
/// is filled in 6 s.
const INTERVAL: Duration = Duration::from_secs(1);

/// Pause after a check that found nothing to evict in a table above the limit: its entries are not
/// assured, or not of containers. Each check reads the whole table.
const PAUSE: Duration = Duration::from_secs(5);

/// Starts a thread that limits the flows of `firewall`, in the namespace `host`. It ends with the
/// firewall.
///
/// # Errors
/// The thread cannot be created.
pub(super) fn start(
    firewall: &Arc<Firewall>,
    host: &Namespace,
    limit: Option<usize>,
) -> io::Result<()> {
    let (firewall, host) = (Arc::downgrade(firewall), host.clone());
    std::thread::Builder::new().name("tidegate-flows".into()).spawn(move || {
        let entered = if host.is_current() { Ok(()) } else { host.enter() };
        match entered {
            Ok(()) => run(&firewall, limit),
            Err(error) => tracing::warn!(%error, "tracked flows of containers are not limited"),
        }
    })?;
    Ok(())
}

fn run(firewall: &Weak<Firewall>, limit: Option<usize>) {
    let logs = LogInterval::default();
    loop {
        let pause = {
            let Some(firewall) = firewall.upgrade() else { return };
            match firewall.limit_tracked_flows(limit) {
                Ok(EvictedFlows { flows: 0, .. }) => {
                    let [entries, limit, _] = firewall.tracked_flows();
                    if entries > limit { PAUSE } else { INTERVAL }
                }
                Ok(EvictedFlows { flows, largest }) => {
                    if logs.is_due(Instant::now()) {
                        let (address, held) = largest.unzip();
                        tracing::warn!(
                            limit = firewall.tracked_flows()[1],
                            largest = address.map(|address| address.to_string()),
                            held,
                            evicted = flows,
                            "limit of tracked flows reached"
                        );
                    }
                    INTERVAL
                }
                Err(error) => {
                    tracing::debug!(%error, "conntrack table not readable");
                    PAUSE
                }
            }
        };
        std::thread::sleep(pause);
    }
}
