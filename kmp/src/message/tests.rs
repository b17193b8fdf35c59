use proptest::prelude::*;

use super::*;

fn round_trip(m: &Message) -> Message {
    let mut out = Vec::new();
    m.write_payload(&mut out).unwrap();
    Message::read(m.kind() as u16, &out).unwrap()
}

fn figure() -> impl Strategy<Value = f64> {
    (0.0f32..1e6).prop_map(f64::from)
}

fn metrics() -> impl Strategy<Value = Metrics> {
    let psi = || prop::option::of(figure());
    let cpu =
        (any::<u32>(), figure(), figure(), psi()).prop_map(|(online, busy_percent, load1, pressure)| {
            CpuMetrics { online, busy_percent, load1, pressure }
        });
    let memory = (any::<u64>(), any::<u64>(), psi()).prop_map(|(total, available, pressure)| MemoryMetrics {
        total,
        available,
        pressure,
    });
    let io = (any::<u64>(), psi()).prop_map(|(probe_us, pressure)| IoMetrics { probe_us, pressure });
    (prop::option::of(cpu), prop::option::of(memory), prop::option::of(io))
        .prop_map(|(cpu, memory, io)| Metrics { cpu, memory, io })
}

fn reply() -> impl Strategy<Value = Option<Reply>> {
    prop::option::of((any::<bool>(), ".{0,40}").prop_map(|(ok, detail)| Reply { ok, detail }))
}

fn blob() -> impl Strategy<Value = Blob> {
    prop::collection::vec(any::<u8>(), 0..600).prop_map(Blob::from)
}

fn ranges() -> impl Strategy<Value = Vec<Range>> {
    prop::collection::vec((any::<u64>(), any::<u64>()).prop_map(|(base, size)| Range { base, size }), 0..5)
}

fn names() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec("[a-z,-]{0,20}", 0..5)
}

fn role() -> impl Strategy<Value = Role> {
    prop_oneof![Just(Role::Control), Just(Role::Bulk)]
}

/// Any message of any type.
pub(crate) fn message() -> impl Strategy<Value = Message> {
    let connection = prop_oneof![
        (any::<(u16, u16, u16, u64, u64)>(), role(), names(), ".{0,30}").prop_map(
            |(n, role, capabilities, release)| {
                Hello {
                    min_version: n.0,
                    max_version: n.1,
                    instance: n.2,
                    incarnation: n.3,
                    boot_nonce: n.4,
                    role,
                    capabilities,
                    release,
                }
                .into()
            }
        ),
        (any::<(u16, u16, u64, u64)>(), role(), names(), ".{0,30}").prop_map(
            |(n, role, capabilities, release)| {
                HelloAck {
                    version: n.0,
                    instance: n.1,
                    incarnation: n.2,
                    boot_nonce: n.3,
                    role,
                    capabilities,
                    release,
                }
                .into()
            }
        ),
        (any::<bool>(), any::<u64>()).prop_map(|(t, grace_ms)| {
            let reason = if t { ByeReason::Terminate } else { ByeReason::Disconnect };
            Bye { reason, grace_ms }.into()
        }),
        ".{0,30}".prop_map(|detail| ByeAck { detail }.into()),
    ];
    let health = prop_oneof![
        any::<(bool, u32, bool)>().prop_map(|(metrics, guardian_ms, serves)| HeartbeatReq {
            metrics,
            guardian_ms,
            serves
        }
        .into()),
        (any::<(u64, Option<u64>, Option<u32>, u32)>(), metrics()).prop_map(
            |((incarnation, uptime_ns, agent_pid, agent_restarts), metrics)| {
                HeartbeatRsp { incarnation, uptime_ns, agent_pid, metrics, agent_restarts }.into()
            }
        ),
        (0..3, ".{0,30}", metrics()).prop_map(|(l, reason, metrics)| {
            let level = [HealthLevel::Ok, HealthLevel::Degraded, HealthLevel::Critical][l as usize];
            HealthStatus { level, reason, metrics }.into()
        }),
        (any::<(u64, u16, u32, u64, bool, u64)>(), ".{0,20}", prop::collection::vec(any::<u32>(), 0..5))
            .prop_map(|((generation, id, cid, incarnation, serves, memory_bytes), name, cpus)| {
                let release = name.clone();
                let one = Neighbour { name, id, cid, incarnation, serves, release, cpus, memory_bytes };
                Topology { generation, instances: vec![one] }.into()
            }),
    ];
    let recovery = prop_oneof![
        (any::<(u64, u16, u64)>(), ".{0,30}", reply()).prop_map(
            |((incident, instance, incarnation), cause, reply)| {
                RecoverPrepare { incident, instance, incarnation, cause, reply }.into()
            }
        ),
        (any::<(u64, u16, u64)>(), prop::collection::vec(any::<u32>(), 0..9), ranges(), reply()).prop_map(
            |((incident, instance, incarnation), cpus, memory, reply)| {
                RecoverReclaim { incident, instance, incarnation, cpus, memory, reply }.into()
            }
        ),
        (any::<(u64, u16, u64)>(), reply()).prop_map(|((incident, instance, incarnation), reply)| {
            RecoverComplete { incident, instance, incarnation, reply }.into()
        }),
        (any::<(u64, u16, bool)>(), ranges(), names(), reply()).prop_map(|(n, slices, encodings, reply)| {
            VmcoreStart { incident: n.0, instance: n.1, slices, encodings, skip_zero: n.2, reply }.into()
        }),
        (any::<(u64, u64, u64)>(), "[a-z]{0,5}", blob()).prop_map(|(n, encoding, data)| {
            VmcoreData { incident: n.0, address: n.1, length: n.2, encoding, data }.into()
        }),
        (any::<(u64, u64, u64)>(), reply()).prop_map(|(n, outcome)| {
            VmcoreComplete { incident: n.0, pieces: n.1, bytes: n.2, outcome: outcome.unwrap_or_default() }
                .into()
        }),
    ];
    let morph = prop_oneof![
        (any::<u64>(), ".{0,20}", ".{0,20}", reply()).prop_map(|(morph, from_release, to_release, reply)| {
            MorphPrepare { morph, from_release, to_release, reply }.into()
        }),
        (any::<u64>(), names(), names(), reply()).prop_map(|(morph, capabilities, s, reply)| {
            let sections = s
                .into_iter()
                .map(|compatible| Section {
                    name: "x".into(),
                    size: compatible.len() as u64,
                    version: compatible.len() as u32,
                    compatible,
                })
                .collect();
            let (token, window, wait_ms, takes_over) = (morph / 3, morph / 5, morph / 2, morph % 2 == 1);
            MorphNegotiate { morph, capabilities, token, window, sections, wait_ms, takes_over, reply }.into()
        }),
        (any::<(u64, u32, u32, u64, bool, bool, Option<u8>)>(), any::<(u16, u64, bool)>(), blob(), reply())
            .prop_map(|(n, (peer, token, direct), data, reply)| {
                let (morph, round, section, offset, last, freeze, throttle) = n;
                let (froze_ns, bytes, sent) = (offset, offset / 2, token / 2);
                let (window, shared) = (token / 3, offset / 3);
                let (takes_over, took_over) = (freeze && direct, freeze && token % 2 == 1);
                MorphTransferState {
                    morph,
                    round,
                    section,
                    offset,
                    data,
                    last,
                    freeze,
                    throttle,
                    peer,
                    token,
                    window,
                    shared,
                    direct,
                    bytes,
                    sent,
                    froze_ns,
                    takes_over,
                    took_over,
                    reply,
                }
                .into()
            }),
        (any::<(u64, bool)>(), reply()).prop_map(|((morph, serves), reply)| MorphCommit {
            morph,
            serves,
            reply
        }
        .into()),
        (any::<(u64, bool)>(), ".{0,20}", reply()).prop_map(|((morph, serves), reason, reply)| {
            MorphRollback { morph, reason, serves, took_over: !serves && morph % 2 == 1, reply }.into()
        }),
    ];
    let fault = prop_oneof![
        ".{0,40}".prop_map(|message| Error { code: ErrorCode::WrongInstance, message }.into()),
        (any::<u64>(), ".{0,40}").prop_map(|(after_ms, reason)| Retry { after_ms, reason }.into()),
    ];
    prop_oneof![connection, health, recovery, morph, fault]
}

#[test]
fn codes_and_groups_are_the_ones_of_the_protocol() {
    let codes: Vec<u16> = MessageType::ALL.iter().map(|t| *t as u16).collect();
    assert_eq!(
        codes,
        [
            1, 2, 3, 4, 0x101, 0x102, 0x103, 0x104, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x301, 0x302,
            0x303, 0x304, 0x305, 0x306, 0xF00, 0xF01
        ]
    );
    for &t in MessageType::ALL {
        assert_eq!(MessageType::from_code(t as u16), Some(t));
    }
    assert_eq!(MessageType::from_code(0x0105), None);
}

#[test]
fn unknown_types_and_bad_payloads_are_told_apart() {
    assert_eq!(Message::read(0x0777, &[]), Err(MessageError::UnknownType(0x0777)));
    let e = Message::read(0x0101, b"\xa3abc").unwrap_err();
    assert!(e.to_string().starts_with("payload of HEARTBEAT_REQ: "), "{e}");
    let e = Message::read(0x0101, b"\x80\x80").unwrap_err();
    assert!(e.to_string().contains("1 bytes follow the map of 1 bytes"), "{e}");
}

#[test]
fn missing_fields_have_defaults_and_unknown_ones_are_skipped() {
    // {"metrics": true, "later": {"a": [1, 2]}}
    let newer = b"\x82\xa7metrics\xc3\xa5later\x81\xa1a\x92\x01\x02";
    assert_eq!(
        Message::read(0x0101, newer).unwrap(),
        HeartbeatReq { metrics: true, ..Default::default() }.into()
    );
    assert_eq!(Message::read(0x0101, b"\x80").unwrap(), HeartbeatReq::default().into());
    assert_eq!(Message::read(0x0101, b"").unwrap(), HeartbeatReq::default().into());
}

/// Heartbeats as the release before this one wrote and reads them.
mod before {
    use serde::{Deserialize, Serialize};

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default)]
    pub struct HeartbeatReq {
        pub metrics: bool,
    }

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default)]
    pub struct HeartbeatRsp {
        pub inc: u64,
        pub metrics: super::Metrics,
    }
}

#[test]
fn the_guardians_fields_are_nothing_to_the_release_before() {
    let written = |m: &Message| {
        let mut out = Vec::new();
        m.write_payload(&mut out).unwrap();
        out
    };
    let req = |guardian_ms| Message::from(HeartbeatReq { metrics: true, guardian_ms, serves: false });
    let rsp =
        |agent_restarts| Message::from(HeartbeatRsp { incarnation: 7, agent_restarts, ..Default::default() });
    // Unused, they are not on the wire at all.
    let old = before::HeartbeatReq { metrics: true };
    assert_eq!(written(&req(0)), rmp_serde::to_vec_named(&old).unwrap());
    let old_rsp = before::HeartbeatRsp { inc: 7, ..Default::default() };
    assert_eq!(written(&rsp(0)), rmp_serde::to_vec_named(&old_rsp).unwrap());
    // Used, the release before skips them.
    for ms in [1, 250, GUARDIAN_OFF] {
        let read: before::HeartbeatReq = rmp_serde::from_slice(&written(&req(ms))).unwrap();
        assert_eq!(read, old);
        assert_eq!(round_trip(&req(ms)), req(ms));
    }
    let read: before::HeartbeatRsp = rmp_serde::from_slice(&written(&rsp(3))).unwrap();
    assert_eq!(read, old_rsp);
    // And what it writes reads as "on exit only" and "never restarted".
    assert_eq!(Message::read(0x0101, &rmp_serde::to_vec_named(&old).unwrap()).unwrap(), req(0));
    assert_eq!(Message::read(0x0102, &rmp_serde::to_vec_named(&old_rsp).unwrap()).unwrap(), rsp(0));
}

#[test]
fn values_of_a_later_version_are_read_as_unknown() {
    let m = Message::read(0x0F00, b"\x81\xa4code\xaabrand-newx").unwrap();
    assert_eq!(m, Error { code: ErrorCode::Unknown, message: String::new() }.into());
    let m = Message::read(0x0003, b"\x81\xa6reason\xa4nova").unwrap();
    assert_eq!(m, Bye { reason: ByeReason::Unknown, grace_ms: 0 }.into());
}

#[test]
fn nested_payloads_end_at_the_depth_limit() {
    let mut bomb = b"\x81\xa1z".to_vec();
    bomb.extend(std::iter::repeat_n(0x91, 60_000));
    bomb.push(0xc0);
    assert!(Message::read(0x0101, &bomb).unwrap_err().to_string().contains("depth"));
}

#[test]
fn the_largest_heartbeat_fits_one_interrupt() {
    let pressure = Some(99.99);
    let m = Message::HeartbeatRsp(HeartbeatRsp {
        incarnation: u64::MAX,
        uptime_ns: Some(u64::MAX),
        agent_pid: Some(u32::MAX),
        metrics: Metrics {
            cpu: Some(CpuMetrics { online: u32::MAX, busy_percent: 33.3, load1: 1e30, pressure }),
            memory: Some(MemoryMetrics { total: u64::MAX, available: u64::MAX, pressure }),
            io: Some(IoMetrics { probe_us: u64::MAX, pressure }),
        },
        agent_restarts: u32::MAX,
    });
    let mut out = Vec::new();
    m.write_payload(&mut out).unwrap();
    assert!(crate::frame::HEADER_LEN + out.len() < 256, "{} bytes of payload", out.len());
}

proptest! {
    #[test]
    fn every_message_comes_back_as_it_was(m in message()) {
        prop_assert_eq!(round_trip(&m), m);
    }

    #[test]
    fn mutated_payloads_never_panic(m in message(), at: prop::sample::Index, byte: u8, cut: prop::sample::Index) {
        let mut out = Vec::new();
        m.write_payload(&mut out).unwrap();
        let i = at.index(out.len());
        out[i] = byte;
        out.truncate(cut.index(out.len()) + 1);
        let _ = Message::read(m.kind() as u16, &out);
    }
}
