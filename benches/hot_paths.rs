//! Criterion benchmarks of the pure code that runs per packet, connection or port: `cargo bench
//! --bench hot_paths`.

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};
use tidegate_model::{CidrSet, PortSpec, overlap};
use tidegate_proxy::ProxyProtocol;
use tidegate_proxy::udp::session_table::{Client, SessionTable, TableLimits};
use tidegate_reactor::batch::next_group;
use tidegate_reactor::{Arena, Timers, Token};

fn client(number: u32) -> Client {
    let ip = Ipv4Addr::from(0xc633_6400 + number / 4);
    Client {
        address: SocketAddr::from((ip, 1024 + (number % 4) as u16)),
        local: Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
    }
}

fn sessions(c: &mut Criterion) {
    let limits = TableLimits { sessions: 4096, per_source: 1024, idle: Duration::from_secs(90) };
    let now = Instant::now();
    let mut table = SessionTable::new(limits);
    for number in 0..4096 {
        table.insert(client(number), number, now);
    }
    let mut number = 0;
    c.bench_function("udp session: find and touch, of 4096", |b| {
        b.iter(|| {
            number = (number + 1) % 4096;
            let key = table.find(&client(number));
            if let Some(key) = key {
                table.touch(black_box(key), false, now);
            }
        });
    });
    let mut forged = 1 << 20;
    c.bench_function("udp session: evict and insert, table full", |b| {
        b.iter(|| {
            forged += 1;
            black_box(table.make_room(&client(forged), usize::MAX, now));
            table.insert(client(forged), forged, now);
        });
    });
}

fn merging(c: &mut Criterion) {
    let mut sizes = vec![(1200, 1200); 64];
    sizes[40] = (300, 300);
    c.bench_function("datagrams: group a batch of 64", |b| {
        b.iter(|| {
            let mut start = 0;
            while start < sizes.len() {
                start =
                    next_group(start..sizes.len(), 65_535, |i| black_box(sizes[i])).messages.end;
            }
        });
    });
}

fn tables(c: &mut Criterion) {
    c.bench_function("arena: insert, look up, remove", |b| {
        let mut arena = Arena::new();
        b.iter(|| {
            let key = arena.insert(black_box(7u64));
            black_box(arena.get(key));
            arena.remove(key)
        });
    });
    c.bench_function("timers: arm and disarm among 1000", |b| {
        let (mut arena, mut timers) = (Arena::new(), Timers::default());
        let start = Instant::now();
        for millisecond in 0..1000 {
            timers.arm(start + Duration::from_millis(millisecond), Token::new(0, arena.insert(())));
        }
        let token = Token::new(1, arena.insert(()));
        let deadline = start + Duration::from_millis(500);
        b.iter(|| {
            timers.arm(black_box(deadline), token);
            timers.disarm(deadline, token);
        });
    });
}

fn door(c: &mut Criterion) {
    let blocks: Vec<String> =
        (0..1000u32).map(|n| format!("10.{}.{}.0/24", n / 250, n % 250)).collect();
    let allow = CidrSet::parse(&blocks).expect("valid blocks");
    let asked: IpAddr = Ipv4Addr::new(10, 2, 77, 9).into();
    c.bench_function("allow-list: 1000 networks", |b| b.iter(|| allow.contains(black_box(asked))));
    let (from, to) =
        (SocketAddr::from(([203, 0, 113, 9], 40_001)), SocketAddr::from(([203, 0, 113, 1], 443)));
    for version in [ProxyProtocol::V1, ProxyProtocol::V2] {
        c.bench_function(&format!("PROXY protocol {version}: header"), |b| {
            b.iter(|| version.header(black_box(from), black_box(to)));
        });
    }
}

fn specs(c: &mut Criterion) {
    c.bench_function("port spec: parse", |b| {
        b.iter(|| black_box("[2001:db8::1]:8080-8089:80-89/tcp").parse::<PortSpec>());
    });
    let many: Vec<PortSpec> =
        (0..10_000).map(|n| format!("{}:80", 10_000 + n).parse().expect("a valid spec")).collect();
    c.bench_function("port specs: overlap of 10,000", |b| {
        b.iter_batched(|| (), |()| overlap(black_box(&many)), BatchSize::SmallInput);
    });
}

criterion_group!(hot_paths, sessions, merging, tables, door, specs);
criterion_main!(hot_paths);
