//! Networks are added and removed while others are queried.

use crate::support::client::query;
use crate::support::{TestBed, endpoint};
use hickory_server::proto::op::Message;
use hickory_server::proto::rr::RecordType;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tidegate_dns::{NetworkSpec, ServeOptions};
use tidegate_testbed::Namespace;

#[test]
fn no_query_is_lost_while_200_networks_are_added_and_removed() {
    const NETWORKS: usize = 200;
    let bed = TestBed::new(Namespace::new(), "");
    bed.network("steady");
    bed.endpoint("steady", "web", &[], &["172.30.1.2"]);
    let client = bed.serve("web");
    let socket = client.namespace.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    socket.connect("127.0.0.11:53").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let ends = Arc::new(AtomicBool::new(false));
    let asking = std::thread::spawn({
        let ends = Arc::clone(&ends);
        move || {
            let start = Instant::now();
            let (mut asked, mut answered) = (0_u32, 0_u32);
            while !ends.load(Ordering::Relaxed) {
                asked += 1;
                let id = asked as u16;
                socket.send(&query(id, "web", RecordType::A).to_vec().unwrap()).unwrap();
                let mut buffer = [0; 512];
                if let Ok(length) = socket.recv(&mut buffer) {
                    let answer = Message::from_vec(&buffer[..length]).unwrap();
                    answered += u32::from(answer.metadata.id == id && answer.answers.len() == 1);
                }
                let next = start + asked * Duration::from_millis(1);
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
            (asked, answered, start.elapsed())
        }
    });
    let namespaces: Vec<_> = (0..8).map(|_| Namespace::new()).collect();
    let _guard = bed.runtime.enter();
    for number in 0..NETWORKS {
        let name = format!("net{number}");
        bed.resolver
            .add_network(&NetworkSpec { name: name.clone(), ..NetworkSpec::default() })
            .unwrap();
        let mut serving = Vec::new();
        for (place, namespace) in namespaces.iter().enumerate() {
            let container = format!("c{number}-{place}");
            bed.resolver
                .add_endpoint(&name, &endpoint(&container, &["web", "x"], &["10.1.0.2"]))
                .unwrap();
            let namespace = crate::support::handle(namespace);
            serving.push(
                bed.resolver.serve(&namespace, &container, &ServeOptions::default()).unwrap(),
            );
        }
        drop(serving);
        assert!(bed.resolver.remove_network(&name));
    }
    // At least one second, however fast the changes were.
    std::thread::sleep(Duration::from_secs(1));
    ends.store(true, Ordering::Relaxed);
    let (asked, answered, time) = asking.join().unwrap();
    println!(
        "{answered} of {asked} queries answered in {time:?}, while {NETWORKS} networks with 8 servers each were added and removed"
    );
    assert_eq!(asked, answered);
    assert!(f64::from(asked) / time.as_secs_f64() > 900.0, "{asked} in {time:?}");
}
