//! Parses the `ports` of a service, in the short syntax (`docker run -p`) and the long one.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::error::{Fault, Site};
use super::value::Value;
use std::net::IpAddr;
use tidegate_model::PortSpec;

/// Parses a list of published ports, with the position of each.
pub(super) fn read(ports: &Value<'_>) -> Result<Vec<(PortSpec, Site)>, Fault> {
    let items = ports.items()?;
    items
        .iter()
        .map(|item| {
            Ok((if item.is_map() { long(item)? } else { short(item)? }, item.site().clone()))
        })
        .collect()
}

fn short(item: &Value<'_>) -> Result<PortSpec, Fault> {
    parse(item, &item.scalar()?)
}

/// Translates the long syntax to the short one, so that both share one grammar and its errors.
fn long(item: &Value<'_>) -> Result<PortSpec, Fault> {
    let (mut target, mut published, mut host_ip, mut protocol) = (None, None, None, None);
    for field in item.fields()? {
        let value = &field.value;
        match field.key {
            "target" => target = Some(digits(value, "a port from 1 to 65535", "")?),
            "published" => {
                published = Some(digits(value, "a port or a port range such as 8080-8090", "-")?);
            }
            "host_ip" => host_ip = Some(value.parsed::<IpAddr>("an IP address")?),
            "protocol" => protocol = Some(value.string()?),
            "mode" => {
                let mode = value.string()?;
                if !matches!(mode.as_str(), "host" | "ingress") {
                    return Err(value.fault(format!(
                        "{mode:?} is not host or ingress (both have the same effect)"
                    )));
                }
            }
            "name" | "app_protocol" => drop(value.string()?),
            _ if field.is_extension() => {}
            _ => {
                return Err(field.site.fault(
                    "this key is not supported; remove it (supported: target, published, host_ip, protocol, mode, name, \
                     app_protocol)",
                ));
            }
        }
    }
    let Some(target) = target else {
        return Err(item.fault("no target is set; add the container port, for example target: 80"));
    };
    let address = match host_ip.map(|ip| ip.to_canonical()) {
        None => String::new(),
        Some(IpAddr::V4(ip)) => format!("{ip}:"),
        Some(IpAddr::V6(ip)) => format!("[{ip}]:"),
    };
    let published = match published {
        Some(published) => format!("{published}:"),
        None if address.is_empty() => String::new(),
        None => ":".to_owned(),
    };
    let protocol = protocol.unwrap_or_else(|| "tcp".to_owned());
    parse(item, &format!("{address}{published}{target}/{protocol}"))
}

fn parse(item: &Value<'_>, text: &str) -> Result<PortSpec, Fault> {
    item.checked(text.parse::<PortSpec>().map_err(|error| error.problem))
}

/// A number, or several numbers separated by characters of `between`. Errors call the value `noun`.
fn digits(value: &Value<'_>, noun: &str, between: &str) -> Result<String, Fault> {
    let text = value.scalar()?;
    if text.is_empty() || !text.chars().all(|c| c.is_ascii_digit() || between.contains(c)) {
        return Err(value.fault(format!("{text:?} is not {noun}")));
    }
    Ok(text)
}
