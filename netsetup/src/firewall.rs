//! Networks kept closed by the host's firewall.

mod ruleset;

pub use ruleset::{Opening, Ruleset, Zone};
