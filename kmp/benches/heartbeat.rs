//! Nanoseconds to encode and decode a full heartbeat, beside a copy and a checksum of the same bytes.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::panic,
    missing_docs,
    reason = "a bench measures real time, prints it, and stops at a surprise"
)]

use std::hint::black_box;
use std::time::Instant;

use bytes::BytesMut;
use kmp::frame::{Decoder, Encoder, checksum};
use kmp::message::{CpuMetrics, HeartbeatRsp, IoMetrics, MemoryMetrics, Message, Metrics, Role};

const ROUNDS: u32 = 200_000;

fn time(name: &str, mut f: impl FnMut()) {
    let mut best = f64::MAX;
    for _ in 0..5 {
        let began = Instant::now();
        for _ in 0..ROUNDS {
            f();
        }
        best = best.min(began.elapsed().as_nanos() as f64 / f64::from(ROUNDS));
    }
    println!("{name:<28}{best:>10.1} ns");
}

fn main() {
    let pressure = Some(1.5);
    let message = Message::HeartbeatRsp(HeartbeatRsp {
        incarnation: 3,
        uptime_ns: Some(123_456_789_012),
        agent_pid: Some(71),
        metrics: Metrics {
            cpu: Some(CpuMetrics { online: 8, busy_percent: 12.5, load1: 0.7, pressure }),
            memory: Some(MemoryMetrics { total: 16 << 30, available: 9 << 30, pressure }),
            io: Some(IoMetrics { probe_us: 312, pressure }),
        },
        agent_restarts: 1,
    });
    let encoder = Encoder::new(Role::Control);
    let mut out = BytesMut::with_capacity(4096);
    encoder.encode(&message, 1, 2, &mut out).unwrap();
    let frame = out.to_vec();
    println!("heartbeat answer with every field: {} bytes", frame.len());

    time("encode", || {
        out.clear();
        encoder.encode(black_box(&message), 1, 2, &mut out).unwrap();
    });
    let mut decoder = Decoder::new(Role::Control);
    time("find frame (with checksum)", || {
        let mut input = black_box(&frame[..]);
        black_box(decoder.feed(&mut input).unwrap());
    });
    time("find frame, read message", || {
        let mut input = black_box(&frame[..]);
        match decoder.feed(&mut input).unwrap() {
            Some(f) => drop(black_box(Message::read(f.header.msg_type, &f.payload).unwrap())),
            None => panic!("no frame"),
        }
    });
    let mut header = [0; 32];
    header.copy_from_slice(&frame[..32]);
    let mut copy = vec![0; frame.len()];
    time("floor: copy and checksum", || {
        copy.copy_from_slice(black_box(&frame));
        black_box(checksum(&header, &copy[32..]));
    });
}
