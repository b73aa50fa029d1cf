//! A published UDP port, as both of its ends see it: datagrams, sessions, and addresses that come and go.
//!
//! UDP may lose and reorder. Here nothing between the ends does so unless a buffer is full or an address is not
//! resolved yet, so the tests exchange a datagram before they send many, compare what arrived without regard to its
//! order, and have no more than a few hundred packets under way: a CPU's queue of received packets holds 1,000
//! (`net.core.netdev_max_backlog`), and all namespaces share it.

mod support;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use support::{PATIENCE, Publisher, container, host, host_v6, is_ready, wait_until};
use tidegate_testbed::server::{EchoServer, PeerServer};
use tidegate_testbed::{Namespace, Pattern, Protocol, Signal, Topology, addr};

/// How the published port is called where only IPv4 is looked at.
const PORT: &str = "0.0.0.0:5353/udp";

/// The same for IPv6.
const PORT_V6: &str = "[::]:5353/udp";

/// The largest payload of a datagram over IPv4: 65,535 bytes less the headers.
const LARGEST: usize = 65_507;

// ---- datagrams

#[test]
fn datagrams_of_every_size_are_echoed_over_either_family() {
    let net = Topology::three();
    let _v4 = EchoServer::udp(&net.container, container(53));
    let _v6 = EchoServer::udp(&net.container, (addr::CONTAINER_V6, 53).into());
    for backend in [IpAddr::from(addr::CONTAINER_V4), IpAddr::from(addr::CONTAINER_V6)] {
        let publisher = Publisher::start(&net.host, &format!("5353:53/udp --to {backend}"));
        for to in [host(5353), host_v6(5353)] {
            let client = socket(&net.client, unspecified(to));
            for size in [0, 1, 2, 1199, 1472, 1473, 9000, LARGEST - 1, LARGEST] {
                let sent = payload(size, size as u64);
                client.send_to(&sent, to).unwrap();
                let (answer, from) = receive(&client);
                assert!(answer == sent, "{size} bytes to {to}: {} came back", answer.len());
                assert_eq!(from, to, "{size} bytes");
            }
        }
        let metrics = publisher.metrics();
        for publish in [PORT, PORT_V6] {
            assert_eq!(metrics.port("sessions_total", publish), 1, "{publish} to {backend}");
        }
    }
}

#[test]
fn a_datagram_too_long_for_the_backends_family_is_counted_and_harms_no_other() {
    let net = Topology::three();
    let _echo = EchoServer::udp(&net.container, container(53));
    let publisher = Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    let client = socket(&net.client, unspecified(host_v6(5353)));
    assert_eq!(echo(&client, host_v6(5353), b"before"), b"before");
    // IPv6 does not count its header into the length.
    client.send_to(&payload(LARGEST + 20, 1), host_v6(5353)).unwrap();
    publisher.wait_for_metrics(|metrics| metrics.dropped(PORT_V6, "too_long") == 1);
    assert_eq!(echo(&client, host_v6(5353), b"after"), b"after");
    assert_eq!(publisher.metrics().port("sessions_total", PORT_V6), 1);
}

/// The kernel keeps such a source out if it is IPv4.
#[test]
fn a_datagram_that_claims_to_come_from_a_published_port_is_not_answered_for_ever() {
    let net = Topology::three();
    let _echo = EchoServer::udp(&net.container, (addr::CONTAINER_V6, 53).into());
    let publisher =
        Publisher::start(&net.host, &format!("5353:53/udp 5454:53/udp --to {}", addr::CONTAINER_V6));
    let client = socket(&net.client, unspecified(host_v6(5353)));
    for to in [host_v6(5353), host_v6(5454)] {
        assert_eq!(echo(&client, to, b"before"), b"before");
    }
    for (claimed, to) in [(host_v6(5353), host_v6(5353)), (host_v6(5454), host_v6(5353))] {
        net.client.run(|| {
            let forger = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::DGRAM, None).unwrap();
            forger.set_ip_transparent_v6(true).unwrap();
            forger.bind(&claimed.into()).unwrap();
            forger.send_to(b"for ever", &to.into()).unwrap();
        });
    }
    let metrics = publisher.wait_for_metrics(|metrics| metrics.dropped(PORT_V6, "reflected") == 2);
    assert_eq!(metrics.port("sessions_total", PORT_V6), 1, "the client's alone");
    assert_eq!(echo(&client, host_v6(5353), b"after"), b"after");
}

#[test]
fn a_burst_of_mixed_sizes_keeps_every_boundary() {
    let net = Topology::three();
    let server = socket(&net.container, container(53));
    let _publisher = Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    let client = socket(&net.client, unspecified(host(5353)));
    let upstream = meet(&client, host(5353), &server);
    // Runs of equal ones, which may be joined on the way, and everything that must not be.
    let sizes = [
        1200, 1200, 1200, 700, 0, 0, 1200, 1200, 1, 1, 1, 0, 1473, 1473, 5, 1200, 9000, 9000, 3, LARGEST,
        1200, 1200, 1201, 1200, 0, LARGEST, 2,
    ];
    for round in 0..8 {
        let sent: Vec<Vec<u8>> =
            sizes.iter().zip(round * 100..).map(|(size, seed)| payload(*size, seed)).collect();
        for datagram in &sent {
            client.send_to(datagram, host(5353)).unwrap();
        }
        assert_same_datagrams(&sent, &server);
        for datagram in &sent {
            server.send_to(datagram, upstream).unwrap();
        }
        assert_same_datagrams(&sent, &client);
    }
}

#[test]
fn segments_of_an_offloading_sender_arrive_whole_in_each_direction() {
    const SEGMENT: u16 = 1200;
    let net = Topology::three();
    for (listen, to) in [(container(53), host(5353)), ((addr::CONTAINER_V6, 53).into(), host_v6(5353))] {
        let server = socket(&net.container, listen);
        let publisher = Publisher::start(&net.host, &format!("5353:53/udp --to {}", listen.ip()));
        let client = socket(&net.client, unspecified(to));
        let upstream = meet(&client, to, &server);
        // The last segment is a short one.
        let trains: Vec<Vec<u8>> =
            (0..20).map(|seed| payload(50 * usize::from(SEGMENT) + 77, seed)).collect();
        let segments: Vec<Vec<u8>> =
            trains.iter().flat_map(|train| train.chunks(SEGMENT.into())).map(<[u8]>::to_vec).collect();
        segment_sends(&client, SEGMENT);
        for train in &trains {
            client.send_to(train, to).unwrap();
        }
        assert_same_datagrams(&segments, &server);
        segment_sends(&server, SEGMENT);
        for train in &trains {
            server.send_to(train, upstream).unwrap();
        }
        assert_same_datagrams(&segments, &client);
        let publish = if to.is_ipv4() { PORT } else { PORT_V6 };
        let count = segments.len() as u64;
        publisher.wait_for_metrics(|metrics| {
            let datagrams = |direction| metrics.labelled("datagrams_total", publish, "direction", direction);
            // One more said hello.
            (datagrams("in"), datagrams("out")) == (count + 1, count)
        });
    }
}

#[test]
fn segments_larger_than_the_mtu_towards_the_container_arrive() {
    let net = Topology::three();
    let server = socket(&net.container, container(53));
    let publisher = Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    let client = socket(&net.client, unspecified(host(5353)));
    meet(&client, host(5353), &server);
    // The bridge follows its port.
    net.host.ip(&["link", "set", "port2", "mtu", "1200"]);
    oversized_segments(&client, host(5353), &server);
    // Also for a client whose session begins under this MTU.
    let another = socket(&net.client, unspecified(host(5353)));
    oversized_segments(&another, host(5353), &server);
    let metrics = publisher.metrics();
    assert_eq!(metrics.dropped(PORT, "too_long"), 0);
    assert_eq!(metrics.port("sessions_total", PORT), 2);
}

#[test]
fn segments_larger_than_the_mtu_towards_the_client_arrive() {
    let net = Topology::three();
    let server = socket(&net.container, container(53));
    let _publisher = Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    for namespace in [&net.client, &net.host] {
        namespace.ip(&["link", "set", "eth0", "mtu", "1280"]);
    }
    for to in [host(5353), host_v6(5353)] {
        let client = socket(&net.client, unspecified(to));
        let upstream = meet(&client, to, &server);
        oversized_segments(&server, upstream, &client);
    }
}

// ---- addresses

#[test]
fn an_answer_comes_from_the_address_that_the_client_used() {
    let net = Topology::three();
    net.host.ip_all(
        "addr add 203.0.113.2/24 dev eth0
         addr add 198.51.100.7/32 dev lo
         addr add 2001:db8:1::2/64 dev eth0 nodad
         addr add 2001:db8:9::7/128 dev lo nodad",
    );
    let _echo = EchoServer::udp(&net.container, container(53));
    let _publisher = Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    // One socket talks to all of them: each is a conversation of its own.
    let client = socket(&net.client, unspecified(host(5353)));
    let addresses = [addr::HOST_V4, Ipv4Addr::new(203, 0, 113, 2), Ipv4Addr::new(198, 51, 100, 7)];
    for round in 0..2 {
        for address in addresses {
            let to = SocketAddr::from((address, 5353));
            client.send_to(address.to_string().as_bytes(), to).unwrap();
            assert_eq!(receive(&client), (address.to_string().into_bytes(), to), "round {round}");
        }
    }
    let client = socket(&net.client, unspecified(host_v6(5353)));
    let addresses = ["2001:db8:1::1", "2001:db8:1::2", "2001:db8:9::7"];
    for address in addresses {
        let to = SocketAddr::from((address.parse::<Ipv6Addr>().unwrap(), 5353));
        client.send_to(address.as_bytes(), to).unwrap();
        assert_eq!(receive(&client), (address.as_bytes().to_vec(), to));
    }
    let client = socket(&net.host, unspecified(host(5353)));
    for address in [Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 9), addr::HOST_V4] {
        let to = SocketAddr::from((address, 5353));
        client.send_to(b"from the host itself", to).unwrap();
        assert_eq!(receive(&client), (b"from the host itself".to_vec(), to));
    }
}

#[test]
fn a_broadcast_is_answered_from_the_hosts_own_address() {
    let net = Topology::three();
    net.host.ip_all(
        "addr del 203.0.113.1/24 dev eth0
         addr add 203.0.113.1/24 broadcast 203.0.113.255 dev eth0",
    );
    let _echo = EchoServer::udp(&net.container, container(53));
    let _publisher = Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    let client = socket(&net.client, unspecified(host(5353)));
    client.set_broadcast(true).unwrap();
    client.send_to(b"anybody?", "203.0.113.255:5353").unwrap();
    assert_eq!(receive(&client), (b"anybody?".to_vec(), host(5353)));
}

#[test]
fn a_client_with_a_link_local_address_is_answered() {
    let net = Topology::three();
    let _echo = EchoServer::udp(&net.container, container(53));
    let _publisher = Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    let to = support::link_local(&net.host, &net.client, 5353);
    let client = socket(&net.client, unspecified(to));
    assert_eq!(echo(&client, to, b"from next door"), b"from next door");
}

#[test]
fn clients_and_their_sockets_are_kept_apart() {
    let net = Topology::three();
    let neighbour = net.neighbour();
    let _peers = PeerServer::udp(&net.container, container(53));
    let publisher = Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    let clients =
        [&net.client, &net.client, &neighbour, &net.host].map(|from| socket(from, unspecified(host(5353))));
    let ask_all = || {
        // All questions before the first answer.
        for client in &clients {
            client.send_to(b"who am I?", host(5353)).unwrap();
        }
        clients.each_ref().map(|client| String::from_utf8(receive(client).0).unwrap())
    };
    let seen = ask_all();
    assert!(seen.iter().all(|peer| peer.starts_with("172.30.0.1:")), "{seen:?}");
    let mut distinct = seen.to_vec();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), clients.len(), "{seen:?}");
    assert_eq!(ask_all(), seen, "a session keeps its socket");
    assert_eq!(publisher.metrics().port("sessions", PORT), clients.len() as u64);
}

#[test]
fn only_clients_of_the_allowed_networks_get_a_session() {
    let net = Topology::three();
    let neighbour = net.neighbour();
    let _echo = EchoServer::udp(&net.container, container(53));
    let arguments = format!("5353:53/udp --to {} --allow 203.0.113.0/25", addr::CONTAINER_V4);
    let publisher = Publisher::start(&net.host, &arguments);
    let client = socket(&net.client, unspecified(host(5353)));
    assert_eq!(echo(&client, host(5353), b"welcome"), b"welcome");
    let stranger = socket(&neighbour, unspecified(host(5353)));
    stranger.send_to(b"let me in", host(5353)).unwrap();
    let metrics = publisher.wait_for_metrics(|metrics| metrics.dropped(PORT, "not_allowed") == 1);
    assert_eq!(metrics.port("sessions_total", PORT), 1);
}

// ---- backends that come and go

#[test]
fn a_backend_that_starts_late_serves_the_session_that_waited() {
    let net = Topology::three();
    // By default the kernel tells of a closed port once a second, after the first few times.
    net.container.sysctl("net.ipv4.icmp_ratelimit", "0");
    let publisher = Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    let client = socket(&net.client, unspecified(host(5353)));
    for sent in 1..=3 {
        client.send_to(b"too early", host(5353)).unwrap();
        // The kernel told of the closed port (ICMP), and the session lives.
        let told = publisher.wait_for_metrics(|metrics| metrics.dropped(PORT, "backend_refused") >= sent);
        assert_eq!(told.port("sessions", PORT), 1);
    }
    for round in 0..3 {
        // And once more when it was there and went away.
        let server = EchoServer::udp(&net.container, container(53));
        assert_eq!(echo(&client, host(5353), b"in time"), b"in time", "round {round}");
        let before = publisher.metrics().dropped(PORT, "backend_refused");
        drop(server);
        // A child that another test is just starting may hold a copy of its socket for a moment.
        wait_until("the port is closed", || !net.container.is_bound(Protocol::Udp, 53));
        client.send_to(b"nobody there", host(5353)).unwrap();
        publisher.wait_for_metrics(|metrics| metrics.dropped(PORT, "backend_refused") > before);
    }
    assert_eq!(publisher.metrics().port("sessions_total", PORT), 1);
}

#[test]
fn delivery_resumes_when_the_containers_address_comes_back() {
    let net = Topology::three();
    let _echo = EchoServer::udp(&net.container, (Ipv4Addr::UNSPECIFIED, 53).into());
    let _publisher = Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    let client = socket(&net.client, unspecified(host(5353)));
    for _ in 0..3 {
        assert_eq!(echo(&client, host(5353), b"before"), b"before");
        net.container.ip(&["addr", "del", "172.30.0.2/24", "dev", "eth0"]);
        client.send_to(b"lost", host(5353)).unwrap();
        net.container.ip(&["addr", "add", "172.30.0.2/24", "dev", "eth0"]);
        assert_resumes(&client, host(5353));
    }
}

#[test]
fn delivery_resumes_when_a_container_comes_back_with_another_hardware_address() {
    let net = Topology::three();
    let _echo = EchoServer::udp(&net.container, container(53));
    let _publisher = Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    let client = socket(&net.client, unspecified(host(5353)));
    assert_eq!(echo(&client, host(5353), b"before"), b"before");
    net.host.ip_all("link set port2 down");
    client.send_to(b"lost", host(5353)).unwrap();
    net.container.ip_all("link set eth0 address 02:00:00:00:00:55");
    // As a container's set-up announces its address.
    net.container.sysctl("net.ipv4.conf.eth0.arp_notify", "1");
    net.container.ip_all("link set eth0 down\nlink set eth0 up");
    net.host.ip_all("link set port2 up\nneigh flush dev br0");
    assert_resumes(&client, host(5353));
}

#[test]
fn sessions_are_made_anew_when_the_bridges_ipv4_address_changes() {
    bridge_address_changes(addr::CONTAINER_V4.into(), ["172.30.0.1/24", "172.30.0.254/24"]);
}

#[test]
fn sessions_are_made_anew_when_the_bridges_ipv6_address_changes() {
    bridge_address_changes(addr::CONTAINER_V6.into(), ["fd30::1/64", "fd30::fe/64"]);
}

// ---- sessions and their limits

#[test]
fn a_silent_session_ends_and_gives_its_descriptor_back() {
    let net = Topology::three();
    let _echo = EchoServer::udp(&net.container, container(53));
    let arguments = format!("5353:53/udp --to {} --udp-idle-timeout 300ms", addr::CONTAINER_V4);
    let publisher = Publisher::start(&net.host, &arguments);
    let idle = publisher.process.open_fds();
    for round in 1..=3 {
        let clients: Vec<_> = (0..5).map(|_| socket(&net.client, unspecified(host(5353)))).collect();
        for client in &clients {
            assert_eq!(echo(client, host(5353), b"hello"), b"hello");
        }
        publisher.wait_for_metrics(|metrics| metrics.port("sessions", PORT) == 0);
        wait_until("the descriptors are back", || publisher.process.open_fds() <= idle);
        // The same socket begins another one.
        assert_eq!(echo(&clients[0], host(5353), b"hello again"), b"hello again");
        publisher.wait_for_metrics(|metrics| metrics.port("sessions", PORT) == 0);
        assert_eq!(publisher.metrics().port("sessions_total", PORT), 6 * round);
        assert_eq!(publisher.metrics().port("evicted_sessions_total", PORT), 0);
    }
}

#[test]
fn traffic_in_one_direction_keeps_a_session() {
    // Far longer than a pause between two datagrams can become, far shorter than what follows.
    const IDLE: Duration = Duration::from_millis(1500);
    const TALK: Duration = Duration::from_millis(4000);
    let net = Topology::three();
    let server = socket(&net.container, container(53));
    let arguments =
        format!("5353:53/udp --to {} --udp-idle-timeout {}ms", addr::CONTAINER_V4, IDLE.as_millis());
    let publisher = Publisher::start(&net.host, &arguments);
    let talker = socket(&net.client, unspecified(host(5353)));
    let listener = socket(&net.client, unspecified(host(5353)));
    let of_talker = meet(&talker, host(5353), &server);
    let of_listener = meet(&listener, host(5353), &server);
    let start = Instant::now();
    while start.elapsed() < TALK {
        talker.send_to(b"up", host(5353)).unwrap();
        server.send_to(b"down", of_listener).unwrap();
        assert_eq!(receive(&server), (b"up".to_vec(), of_talker));
        assert_eq!(receive(&listener).0, b"down");
        std::thread::sleep(Duration::from_millis(10));
    }
    let metrics = publisher.metrics();
    assert_eq!(metrics.port("sessions_total", PORT), 2);
    assert_eq!(metrics.port("sessions", PORT), 2);
}

#[test]
fn a_full_table_makes_room_at_the_cost_of_the_longest_silent_unanswered_session() {
    let net = Topology::three();
    let server = socket(&net.container, container(53));
    let arguments =
        format!("5353:53/udp --to {} --udp-max-sessions 8 --udp-idle-timeout 1h", addr::CONTAINER_V4);
    let publisher = Publisher::start(&net.host, &arguments);
    let idle = publisher.process.open_fds();
    let meet = |client: &UdpSocket| meet(client, host(5353), &server);
    let answered = |client: &UdpSocket| {
        let upstream = meet(client);
        server.send_to(b"an answer", upstream).unwrap();
        assert_eq!(receive(client).0, b"an answer");
        upstream
    };
    let new_socket = || socket(&net.client, unspecified(host(5353)));

    let friends: Vec<UdpSocket> = (0..4).map(|_| new_socket()).collect();
    let met: Vec<SocketAddr> = friends.iter().map(answered).collect();
    let strangers: Vec<UdpSocket> = (0..20).map(|_| new_socket()).collect();
    let strangers_met: Vec<SocketAddr> = strangers.iter().map(meet).collect();
    let metrics = publisher.metrics();
    assert_eq!(metrics.port("sessions", PORT), 8);
    assert_eq!(metrics.port("sessions_total", PORT), 24);
    assert_eq!(metrics.port("evicted_sessions_total", PORT), 16);
    wait_until("the evicted ones have closed", || publisher.process.open_fds() <= idle + 8);
    // The answered ones are still there, as are the last of the others.
    for (friend, upstream) in friends.iter().zip(&met) {
        assert_eq!(meet(friend), *upstream);
    }
    assert_eq!(meet(&strangers[19]), strangers_met[19]);
    assert_eq!(publisher.metrics().port("evicted_sessions_total", PORT), 16);

    // Four more that are answered push the last strangers out; then the longest silent friend has to go.
    let more: Vec<UdpSocket> = (0..4).map(|_| new_socket()).collect();
    for client in &more {
        answered(client);
    }
    assert_eq!(meet(&friends[0]), met[0], "it speaks up, which makes its neighbour the longest silent one");
    answered(&new_socket());
    assert_eq!(meet(&friends[0]), met[0]);
    assert_ne!(meet(&friends[1]), met[1], "a new session, for the old one made room");
    let metrics = publisher.metrics();
    assert_eq!(metrics.port("sessions", PORT), 8);
    assert_eq!(metrics.port("evicted_sessions_total", PORT), 16 + 4 + 2);
}

#[test]
fn a_source_address_gets_no_more_than_its_share_of_sessions() {
    let net = Topology::three();
    net.client.ip(&["addr", "add", "203.0.113.10/24", "dev", "eth0"]);
    let _echo = EchoServer::udp(&net.container, container(53));
    let arguments = format!("5353:53/udp --to {} --udp-max-source-sessions 3", addr::CONTAINER_V4);
    let publisher = Publisher::start(&net.host, &arguments);
    let from = |address: Ipv4Addr| socket(&net.client, (address, 0).into());
    let greedy: Vec<UdpSocket> = (0..3).map(|_| from(addr::CLIENT_V4)).collect();
    for client in &greedy {
        assert_eq!(echo(client, host(5353), b"one of three"), b"one of three");
    }
    for refusals in 1..=4 {
        from(addr::CLIENT_V4).send_to(b"one too many", host(5353)).unwrap();
        publisher.wait_for_metrics(|metrics| metrics.dropped(PORT, "source_limit") == refusals);
    }
    assert_eq!(echo(&from(Ipv4Addr::new(203, 0, 113, 10)), host(5353), b"another"), b"another");
    for client in &greedy {
        assert_eq!(echo(client, host(5353), b"still here"), b"still here");
    }
    let metrics = publisher.metrics();
    assert_eq!(metrics.port("sessions_total", PORT), 4);
    assert_eq!(metrics.port("evicted_sessions_total", PORT), 0);
}

#[test]
fn figures_count_every_datagram_and_byte() {
    let net = Topology::three();
    let _echo = EchoServer::udp(&net.container, container(53));
    let publisher = Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    let client = socket(&net.client, unspecified(host(5353)));
    let sizes = [0, 1, 1200, 9000, LARGEST];
    for size in sizes {
        assert_eq!(echo(&client, host(5353), &payload(size, 1)).len(), size);
    }
    let (datagrams, bytes) = (sizes.len() as u64, sizes.iter().sum::<usize>() as u64);
    // An answer may be here before it is counted.
    let metrics = publisher.wait_for_metrics(|metrics| {
        let value = |name, direction| metrics.labelled(name, PORT, "direction", direction);
        ["in", "out"].iter().all(|direction| {
            (value("datagrams_total", direction), value("bytes_total", direction)) == (datagrams, bytes)
        })
    });
    assert_eq!(metrics.port("sessions", PORT), 1);
    assert_eq!(metrics.port("sessions", PORT_V6), 0);
}

#[test]
fn twenty_thousand_sources_are_held_in_bounds_and_do_not_push_a_client_at_work_out() {
    const SOURCES: u32 = 20_000;
    const BATCH: usize = 100;
    const SESSIONS: usize = 1000;
    let net = Topology::three();
    // The client may be any address of this block, and the host believes it.
    net.client.ip(&["route", "add", "local", "198.18.0.0/15", "dev", "lo"]);
    net.host.ip(&["route", "add", "198.18.0.0/15", "via", &addr::CLIENT_V4.to_string()]);
    let _server = Choosy::start(&net.container, container(53));
    let arguments = format!(
        "5353:53/udp --to {} --udp-max-sessions {SESSIONS} --udp-max-source-sessions 100",
        addr::CONTAINER_V4
    );
    let publisher = Publisher::start(&net.host, &arguments);
    let idle = publisher.process.open_fds();
    let at_work = socket(&net.client, unspecified(host(5353)));
    assert_eq!(echo(&at_work, host(5353), b"?answer me"), b"?answer me");

    let mut memory = 0;
    for batch in (0..SOURCES).step_by(BATCH) {
        net.client.run(|| {
            for number in batch..batch + BATCH as u32 {
                let source = Ipv4Addr::from_bits(Ipv4Addr::new(198, 18, 0, 0).to_bits() + number);
                let forged = UdpSocket::bind((source, 1024 + number as u16)).unwrap();
                forged.send_to(b"forged", host(5353)).unwrap();
            }
        });
        // No faster than it is dealt with.
        let sent = u64::from(batch) + BATCH as u64;
        publisher.wait_for_metrics(|metrics| metrics.port("sessions_total", PORT) > sent);
        assert_eq!(echo(&at_work, host(5353), b"?still there"), b"?still there");
        assert!(publisher.process.open_fds() <= idle + SESSIONS);
        if sent == u64::from(SOURCES) / 4 {
            memory = publisher.process.rss();
        }
    }
    let metrics = publisher.metrics();
    assert_eq!(metrics.port("sessions", PORT), SESSIONS as u64);
    assert_eq!(
        metrics.port("sessions_total", PORT),
        u64::from(SOURCES) + 1,
        "the client at work kept its own"
    );
    let evicted = u64::from(SOURCES) + 1 - SESSIONS as u64;
    assert_eq!(metrics.port("evicted_sessions_total", PORT), evicted);
    let grown = publisher.process.rss().saturating_sub(memory);
    assert!(grown < 1 << 20, "{grown} bytes more than after a quarter of them");

    // One address with as many ports gets its share and no more.
    let greedy: Vec<UdpSocket> = (0..150).map(|_| socket(&net.client, unspecified(host(5353)))).collect();
    for client in &greedy {
        client.send_to(b"greedy", host(5353)).unwrap();
    }
    let metrics = publisher.wait_for_metrics(|metrics| metrics.dropped(PORT, "source_limit") >= 51);
    assert_eq!(metrics.port("sessions", PORT), SESSIONS as u64);
    assert_eq!(echo(&at_work, host(5353), b"?still there"), b"?still there");
}

#[test]
fn with_64_descriptors_sessions_at_work_go_on_and_those_too_many_are_counted() {
    let net = Topology::three();
    let _echo = EchoServer::udp(&net.container, container(53));
    let arguments = format!("5353:53/udp --to {}", addr::CONTAINER_V4);
    let publisher =
        Publisher::start_with(&net.host, &arguments, |command| support::limit_open_files(command, 64));
    let clients: Vec<UdpSocket> = (0..100).map(|_| socket(&net.client, unspecified(host(5353)))).collect();
    for client in &clients {
        client.send_to(b"hello", host(5353)).unwrap();
    }
    let settled = |metrics: &support::Metrics| {
        metrics.port("sessions", PORT)
            + metrics.port("evicted_sessions_total", PORT)
            + metrics.dropped(PORT, "exhausted")
            == clients.len() as u64
    };
    let metrics = publisher.wait_for_metrics(settled);
    let served = metrics.port("sessions", PORT) as usize;
    assert!((10..=64).contains(&served), "{served} sessions");
    for client in &clients[..served] {
        assert_eq!(receive(client).0, b"hello");
        assert_eq!(echo(client, host(5353), b"and again"), b"and again");
    }
}

#[test]
fn whom_nobody_answers_does_not_keep_others_out_when_descriptors_are_short() {
    let net = Topology::three();
    let server = socket(&net.container, container(53));
    let arguments = format!("5353:53/udp --to {}", addr::CONTAINER_V4);
    let publisher =
        Publisher::start_with(&net.host, &arguments, |command| support::limit_open_files(command, 64));
    let at_work = socket(&net.client, unspecified(host(5353)));
    let upstream = meet(&at_work, host(5353), &server);
    server.send_to(b"welcome", upstream).unwrap();
    assert_eq!(receive(&at_work).0, b"welcome");
    let silent: Vec<UdpSocket> = (0..100).map(|_| socket(&net.client, unspecified(host(5353)))).collect();
    for client in &silent {
        client.send_to(b"ignore me", host(5353)).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    let late = socket(&net.client, unspecified(host(5353)));
    server.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let arrived = |wanted: &[u8]| {
        let mut buffer = [0; 100];
        std::iter::from_fn(|| {
            server.recv_from(&mut buffer).ok().map(|(length, from)| (buffer[..length].to_vec(), from))
        })
        .find(|(datagram, _)| datagram == wanted)
        .map(|(_, from)| from)
    };
    wait_until("a late client is let in", || {
        late.send_to(b"let me in", host(5353)).unwrap();
        arrived(b"let me in").is_some()
    });
    at_work.send_to(b"still there", host(5353)).unwrap();
    assert_eq!(arrived(b"still there"), Some(upstream), "by the same session as before");
    assert!(publisher.metrics().port("evicted_sessions_total", PORT) > 0);
}

#[test]
fn sessions_do_not_hold_up_the_end() {
    let net = Topology::three();
    let _echo = EchoServer::udp(&net.container, container(53));
    let mut publisher =
        Publisher::start(&net.host, &format!("5353:53/udp --to {} --drain-timeout 1h", addr::CONTAINER_V4));
    let client = socket(&net.client, unspecified(host(5353)));
    assert_eq!(echo(&client, host(5353), b"hello"), b"hello");
    assert_eq!(publisher.process.stop(Signal::TERM, PATIENCE).code(), Some(0));
}

// ---- helpers

/// Any address and port of the family of `like`.
fn unspecified(like: SocketAddr) -> SocketAddr {
    let ip = if like.is_ipv4() { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
    SocketAddr::new(ip, 0)
}

/// A socket with room for a burst, which does not wait for ever.
#[track_caller]
fn socket(namespace: &Namespace, bind: SocketAddr) -> UdpSocket {
    let socket = namespace.run(|| UdpSocket::bind(bind));
    let socket = socket.unwrap_or_else(|error| panic!("bind {bind}: {error}"));
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    // What net.core.rmem_max allows is not enough everywhere.
    rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 16 << 20).unwrap();
    socket
}

#[track_caller]
fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; 1 << 16];
    let (length, from) = socket.recv_from(&mut buffer).expect("a datagram arrives");
    buffer.truncate(length);
    (buffer, from)
}

/// Sends a datagram and returns the next that comes.
#[track_caller]
fn echo(socket: &UdpSocket, to: SocketAddr, datagram: &[u8]) -> Vec<u8> {
    socket.send_to(datagram, to).unwrap();
    receive(socket).0
}

/// Lets `client` say hello to a server that is a mere socket; returns where the server may answer to.
#[track_caller]
fn meet(client: &UdpSocket, to: SocketAddr, server: &UdpSocket) -> SocketAddr {
    client.send_to(b"hello", to).unwrap();
    let (hello, upstream) = receive(server);
    assert_eq!(hello, b"hello");
    upstream
}

/// `size` bytes that depend on `seed`.
fn payload(size: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; size];
    Pattern::new(seed).fill(&mut bytes);
    bytes
}

/// Receives as many datagrams as were sent and compares them, whatever their order.
#[track_caller]
fn assert_same_datagrams(sent: &[Vec<u8>], at: &UdpSocket) {
    let mut received: Vec<Vec<u8>> = Vec::new();
    while received.len() < sent.len() && is_ready(at, PollFlags::IN, PATIENCE) {
        received.push(receive(at).0);
    }
    let mut sent = sent.to_vec();
    sent.sort();
    received.sort();
    let lengths = |datagrams: &[Vec<u8>]| datagrams.iter().map(Vec::len).collect::<Vec<_>>();
    assert_eq!(lengths(&received), lengths(&sent));
    assert!(received == sent, "the lengths are right, the bytes are not");
    assert!(!is_ready(at, PollFlags::IN, Duration::ZERO), "more came than was sent");
}

/// From here on what is sent through `socket` is cut into datagrams of `segment` bytes by the kernel.
fn segment_sends(socket: &UdpSocket, segment: u16) {
    let segment = libc::c_int::from(segment);
    // SAFETY: the pointer and the length describe `segment`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const segment).cast(),
            size_of_val(&segment) as libc::socklen_t,
        )
    };
    assert_eq!(result, 0, "UDP_SEGMENT: {}", io::Error::last_os_error());
}

/// Sends trains of datagrams of 1,400 bytes, which the sender's own link takes and the one behind the proxy does not.
fn oversized_segments(from: &UdpSocket, to: SocketAddr, at: &UdpSocket) {
    const SEGMENT: u16 = 1400;
    let train = payload(20 * usize::from(SEGMENT), 1);
    let segments: Vec<Vec<u8>> = train.chunks(SEGMENT.into()).map(<[u8]>::to_vec).collect();
    segment_sends(from, SEGMENT);
    for _ in 0..3 {
        from.send_to(&train, to).unwrap();
        assert_same_datagrams(&segments, at);
    }
}

/// Sends until an answer comes, which must not take a second.
#[track_caller]
fn assert_resumes(client: &UdpSocket, to: SocketAddr) -> Vec<u8> {
    let start = Instant::now();
    loop {
        client.send_to(b"again", to).unwrap();
        if is_ready(client, PollFlags::IN, Duration::from_millis(20)) {
            assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
            let answer = receive(client).0;
            // Answers to the others that were sent meanwhile.
            while is_ready(client, PollFlags::IN, Duration::from_millis(50)) {
                receive(client);
            }
            return answer;
        }
        assert!(start.elapsed() < Duration::from_secs(5), "no answer comes any more");
    }
}

/// The address of ours that the backend knows goes, comes back, and goes again while another takes its place: sockets
/// that were bound to it must not stay in use.
#[track_caller]
fn bridge_address_changes(backend: IpAddr, [first, second]: [&str; 2]) {
    let net = Topology::three();
    for (namespace, link) in [(&net.host, "br0"), (&net.container, "eth0")] {
        // A neighbour solicitation may be lost while an address is being set up; the next comes after a second.
        namespace.sysctl(&format!("net.ipv6.neigh.{link}.retrans_time_ms"), "50");
        namespace.sysctl(&format!("net.ipv4.neigh.{link}.retrans_time_ms"), "50");
    }
    let _peers = PeerServer::udp(&net.container, (backend, 53).into());
    let publisher = Publisher::start(&net.host, &format!("5353:53/udp --to {backend}"));
    let client = socket(&net.client, unspecified(host(5353)));
    let expect = |gateway: &str| {
        let seen: SocketAddr =
            String::from_utf8(assert_resumes(&client, host(5353))).unwrap().parse().unwrap();
        assert_eq!(seen.ip().to_string(), gateway.split('/').next().unwrap());
    };
    expect(first);
    net.host.ip(&["addr", "del", first, "dev", "br0"]);
    client.send_to(b"lost", host(5353)).unwrap();
    add_address(&net.host, first);
    expect(first);
    net.host.ip(&["addr", "del", first, "dev", "br0"]);
    add_address(&net.host, second);
    expect(second);
    assert_eq!(publisher.metrics().port("sessions", PORT), 1, "no session of the old address stays behind");
}

fn add_address(namespace: &Namespace, address: &str) {
    let mut arguments = vec!["addr", "add", address, "dev", "br0"];
    if address.contains("::") {
        arguments.push("nodad");
    }
    namespace.ip(&arguments);
}

/// A server that answers what begins with a question mark and takes the rest without a word.
struct Choosy {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Choosy {
    #[track_caller]
    fn start(namespace: &Namespace, listen: SocketAddr) -> Self {
        let socket = socket(namespace, listen);
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while !stopped.load(Ordering::Relaxed) {
                let Ok((length, peer)) = socket.recv_from(&mut buffer) else { continue };
                if buffer[..length].starts_with(b"?") {
                    let _ = socket.send_to(&buffer[..length], peer);
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Choosy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
