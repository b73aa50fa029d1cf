//! Checks of the fuzz targets as ordinary functions, so that a test can replay the corpus.
//!
//! Each takes the input of a fuzzer and panics if a property does not hold. Not part of the stable
//! API.

use crate::answer::{Response, SentQuery};
use crate::client_id::ClientId;
use crate::message::{Request, relay};
use crate::metrics::NetworkStats;
use crate::zone::{EndpointSpec, Limits, NetworkSpec, Zones};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

static ZONES: LazyLock<(Zones, ClientId)> = LazyLock::new(|| {
    let mut zones = Zones::new(Limits::default());
    let network = NetworkSpec {
        name: "un1".into(),
        subnets: vec![ipnet::IpNet::new_assert([10, 9, 0, 0].into(), 24)],
        ..NetworkSpec::default()
    };
    let _ = zones.add_network(&network, None, Arc::new(NetworkStats::new("un1")));
    for (number, name) in ["web", "db"].into_iter().enumerate() {
        let spec = EndpointSpec {
            container: name.into(),
            name: name.into(),
            aliases: vec!["all".into()],
            addresses: vec![
                [10, 9, 0, 2 + number as u8].into(),
                [0xfd88, 0, 0, 0, 0, 0, 0, 2 + number as u16].into(),
            ],
            ..EndpointSpec::default()
        };
        let _ = zones.add_endpoint("un1", &spec);
    }
    (zones, ClientId::Container("web".into()))
});

/// Checks `data` as a client message (the response is valid, or there is none) and as an upstream
/// response (what is relayed from it is valid).
pub fn check_message(data: &[u8]) {
    let (zones, client_id) = &*ZONES;
    crate::handler::check(zones, client_id, data);
    check_answer(data);
}

/// Parses `data` as the response to an A query for `web.example` with the ID that `data` has.
fn check_answer(data: &[u8]) {
    let Some(id) = crate::message::short(data, 0) else { return };
    let name: &[u8] = b"\x03web\x07example\0";
    let query = SentQuery { id, name: name.into(), kind: 1, exact: false };
    let Response::Answer(answer) = query.read(data) else { return };
    let mut message = Vec::new();
    crate::message::encode_query(7, name, 1, crate::message::Bits::default(), &mut message);
    let Some(request) = Request::read(&message) else { return };
    for limit in [512, usize::from(u16::MAX)] {
        let mut out = Vec::new();
        relay(&request, &answer.relayed(Duration::from_secs(1)), limit, &mut out);
        assert!(out.len() <= limit, "{} bytes", out.len());
        let read = hickory_server::proto::op::Message::from_vec(&out);
        assert!(read.is_ok(), "{:?} of {data:?}", read.err());
    }
}
