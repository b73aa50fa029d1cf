//! `tidegate daemon` under a service manager: notifications, an inherited API socket, and the
//! systemd units that `make install` installs.

#[path = "api/ask.rs"]
mod ask;

mod daemon_units {
    mod activated;
    mod hardening;
    pub(crate) mod host;
    mod installed;
    mod notified;
}
