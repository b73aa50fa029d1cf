//! [`SystemTime`] as milliseconds since the Unix epoch, for serde. Earlier times are 0.

use serde::{Deserialize, Deserializer, Serializer};
use std::time::{Duration, SystemTime};

pub(super) fn serialize<S: Serializer>(
    time: &SystemTime,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    serializer.serialize_u64(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX))
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<SystemTime, D::Error> {
    let since_epoch = Duration::from_millis(u64::deserialize(deserializer)?);
    SystemTime::UNIX_EPOCH
        .checked_add(since_epoch)
        .ok_or_else(|| serde::de::Error::custom("time out of range"))
}
