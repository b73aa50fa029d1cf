//! Telemetry: logs and the metrics endpoint.
//!
//! | module | purpose |
//! |---|---|
//! | [`logging`] | `tracing` to standard error, filtered and rate-limited |
//! | [`metrics_endpoint`] | `GET /metrics` for Prometheus; the caller adds its families |
//! | [`version`] | version and commit of this build |

#![forbid(unsafe_code)]

pub mod logging;
pub mod metrics_endpoint;
pub mod version;
